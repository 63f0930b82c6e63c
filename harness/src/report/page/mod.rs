//! index.html: the report for a person, in one file that needs nothing else.
//!
//! No script, no font, no image: the page works without network and from a build's artifacts, where JavaScript is
//! often forbidden. Its content security policy allows its own style and nothing more, so that nothing a hostile guest got past
//! the escaping could run. What depends on the moment stands in elements with the attribute `data-timing`.

mod html;

use std::io::{self, Write};

use chrono::DateTime;

use self::html::Html;
use super::words::{self, microseconds};
use super::{FrameRecord, HitRecord, Outcome, Report, StopRecord, TestRecord, TestResult, TrapRecord, VcpuRecord};

/// So many vCPUs are shown unfolded, so many tests, and so many failed tests appear on the timeline.
const OPEN_VCPUS: usize = 4;
const OPEN_TESTS: usize = 40;
const TIMELINE_TESTS: usize = 100;

/// The order in which people look for registers; others follow by name.
const REGISTERS: [&str; 18] = [
    "rip", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15", "rflags",
];

const HEAD: &str = concat!(
    "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n",
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n",
    "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n",
    "<meta name=\"referrer\" content=\"no-referrer\">\n<style>\n",
    include_str!("style.css"),
    "</style>\n<title>"
);

/// The sections, and their headings.
const SECTIONS: [(&str, &str); 7] = [
    ("stop", "What happened"),
    ("timeline", "Timeline"),
    ("vcpus", "vCPUs"),
    ("traps", "Traps"),
    ("tests", "Tests"),
    ("console", "Console"),
    ("input", "Run"),
];

impl Report {
    /// Writes index.html.
    pub fn write_page(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut page = Html::default();
        page.raw(HEAD).text(format_args!("{}: {}", words::kind(self.verdict.kind), self.input.kernel));
        page.raw("</title>\n</head>\n<body>\n");
        header(&mut page, self);
        page.raw("<nav><div>");
        for (id, heading) in SECTIONS {
            page.raw("<a href=\"#").text(id).raw("\">").text(heading).raw("</a>");
        }
        page.raw("</div></nav>\n<main>\n");
        let contents: [fn(&mut Html, &Report); SECTIONS.len()] = [stop, timeline, vcpus, traps, tests, console, input];
        for ((id, heading), content) in SECTIONS.iter().zip(contents) {
            page.raw("<section id=\"").text(id).raw("\">\n").element("h2", heading);
            content(&mut page, self);
            page.raw("</section>\n");
        }
        page.raw("</main>\n<footer><div>").text(format_args!("Trapline {}", self.trapline)).raw("</div></footer>\n");
        page.raw("</body>\n</html>\n");
        out.write_all(page.into_text().as_bytes())
    }
}

fn header(page: &mut Html, report: &Report) {
    let verdict = &report.verdict;
    page.raw(if verdict.exit_code == 0 { "<header class=\"pass\">" } else { "<header class=\"fail\">" });
    page.raw("<div>").element("span class=\"badge\"", words::kind(verdict.kind)).element("h1", &verdict.text);
    page.raw("<p>").text(format_args!("exit code {}", verdict.exit_code));
    if let Some(status) = verdict.guest_status {
        page.text(format_args!(" \u{b7} guest status {status}"));
    }
    page.raw("<span data-timing>").text(format_args!(" \u{b7} ran {}", words::seconds(report.timing.duration_ms)));
    if let Some(started) = i64::try_from(report.timing.started).ok().and_then(|at| DateTime::from_timestamp(at, 0)) {
        page.text(format_args!(" \u{b7} began {} UTC", started.format("%Y-%m-%d %H:%M:%S")));
    }
    page.raw("</span></p></div></header>\n");
}

/// What ended the run.
fn stop(page: &mut Html, report: &Report) {
    let verdict = &report.verdict;
    let trap = verdict.trap.and_then(|trap| report.traps.get(trap));
    let Some(stop) = &report.stop else {
        page.raw("<dl>");
        rule(page, trap);
        row(page, "End", &verdict.text);
        page.raw("</dl>\n");
        return;
    };
    page.raw("<dl>");
    rule(page, trap);
    row(page, "Reason", &stop.reason);
    if let Some(at) = &stop.at {
        page.raw("<dt>Where</dt><dd>").element("code", at);
        if let Some(vcpu) = stop.vcpu {
            page.text(format_args!(" on vCPU {vcpu}"));
        }
        page.raw("</dd>");
    } else if let Some(vcpu) = stop.vcpu {
        row(page, "Where", &format!("on vCPU {vcpu}"));
    }
    if let Some(source) = &stop.source {
        page.raw("<dt>Source</dt><dd>").element("code", words::source(source)).raw("</dd>");
    }
    if let Some(change) = &stop.change {
        page.raw("<dt>Value</dt><dd>").element("code", words::change(change)).raw("</dd>");
    }
    page.raw("<dt>When</dt><dd data-timing>").text(microseconds(stop.timing.at_us));
    if marked_line(report).is_some() {
        page.raw(", <a href=\"#marked\">then on the console</a>");
    }
    page.raw("</dd></dl>\n");
    if !stop.backtrace.is_empty() {
        page.raw("<h3>Backtrace").text(vcpu_of(stop)).raw("</h3>\n");
        frames(page, &stop.backtrace);
    }
}

fn rule(page: &mut Html, trap: Option<&TrapRecord>) {
    if let Some(trap) = trap {
        page.raw("<dt>Rule</dt><dd>").element("code", &trap.rule).raw("</dd>");
    }
}

fn row(page: &mut Html, label: &'static str, text: &str) {
    page.raw("<dt>").raw(label).raw("</dt><dd>").text(text).raw("</dd>");
}

fn vcpu_of(stop: &StopRecord) -> String {
    stop.vcpu.map(|vcpu| format!(" of vCPU {vcpu}")).unwrap_or_default()
}

fn frames(page: &mut Html, frames: &[FrameRecord]) {
    page.raw("<ol class=\"frames mono\">\n");
    for frame in frames {
        page.raw("<li><span>").text(words::function(frame));
        if let Some(remark) = words::remark(frame) {
            page.raw(" ").element("span class=\"faint\"", format_args!("({remark})"));
        }
        page.raw("</span>").raw("<span>").text(frame.source.as_ref().map(words::source).unwrap_or_default());
        page.raw("</span></li>\n");
    }
    page.raw("</ol>\n");
}

/// Something on the timeline.
struct Moment<'a> {
    at_us: u64,
    /// Class of its mark.
    class: &'static str,
    what: String,
    hit: Option<&'a HitRecord>,
}

fn moments(report: &Report) -> Vec<Moment<'_>> {
    let plain = |at_us: u64, class: &'static str, what: String| Moment { at_us, class, what, hit: None };
    let from_ms = |ms: u64| ms.saturating_mul(1000);
    let mut moments = vec![plain(0, "", "the guest's first instruction".to_owned())];
    if let Some(ms) = report.timing.boot_ms {
        moments.push(plain(from_ms(ms), "good", "the kernel has started the first user program".to_owned()));
    }
    for hit in &report.timing.recent {
        let name = report.traps.get(hit.trap).map_or("a trap", |trap| trap.name.as_str());
        let times = hit.timing.hits_before.saturating_add(1);
        let what = format!("{name}: hit {times}, vCPU {}, at {}", hit.vcpu, hit.at);
        moments.push(Moment { at_us: hit.timing.at_us, class: "", what, hit: Some(hit) });
    }
    let failed = report.tests.iter().filter(|test| test.result == TestResult::Failed);
    moments.extend(
        failed
            .take(TIMELINE_TESTS)
            .map(|test| plain(from_ms(test.timing.at_ms), "bad", format!("test failed: {}", words::test_path(test)))),
    );
    if let Some(stop) = &report.stop {
        moments.push(plain(stop.timing.at_us, "bad", stop.reason.clone()));
    }
    moments.push(plain(from_ms(report.timing.duration_ms), "", "the run ended".to_owned()));
    moments.sort_by_key(|moment| moment.at_us);
    moments
}

fn timeline(page: &mut Html, report: &Report) {
    let moments = moments(report);
    let end = moments.last().map_or(0, |last| last.at_us);
    page.raw(
        "<div class=\"timeline\" data-timing>\n<svg viewBox=\"0 0 1000 44\" preserveAspectRatio=\"none\" role=\"img\">",
    );
    page.raw("<title>when what happened</title><line class=\"axis\" x1=\"0\" x2=\"1000\" y1=\"22\" y2=\"22\"/>");
    // What is bad is drawn last, and so over the others.
    let (bad, others): (Vec<_>, Vec<_>) = moments.iter().partition(|moment| moment.class == "bad");
    for moment in others.into_iter().chain(bad) {
        // Two units from either end, so that a mark there is whole.
        let at = format!("{:.1}", 2.0 + 996.0 * (moment.at_us as f64 / end.max(1) as f64));
        page.raw("<line class=\"at ")
            .text(moment.class)
            .raw("\" vector-effect=\"non-scaling-stroke\" y1=\"8\" y2=\"36\"");
        page.raw(" x1=\"").text(&at).raw("\" x2=\"").text(&at).raw("\">");
        page.element("title", format_args!("{}: {}", microseconds(moment.at_us), moment.what)).raw("</line>");
    }
    page.raw("</svg>\n<div class=\"ends faint\"><span>0</span><span>").text(microseconds(end)).raw("</span></div>\n");
    page.raw("<div class=\"wide scroll\"><table><tbody>\n");
    for moment in &moments {
        page.raw("<tr><td class=\"n\">").text(microseconds(moment.at_us)).raw("</td><td class=\"t\">");
        match moment.class {
            "" => page.text(&moment.what),
            class => page.raw("<span class=\"").text(class).raw("\">").text(&moment.what).raw("</span>"),
        };
        if let Some(hit) = moment.hit {
            hit_details(page, hit);
        }
        page.raw("</td></tr>\n");
    }
    page.raw("</tbody></table></div>\n</div>\n");
}

fn hit_details(page: &mut Html, hit: &HitRecord) {
    if let Some(source) = &hit.source {
        page.raw(" ").element("code class=\"faint\"", words::source(source));
    }
    if let Some(change) = &hit.change {
        page.raw(" ").element("code", words::change(change));
    }
    if !hit.backtrace.is_empty() {
        page.raw("<details><summary>backtrace</summary><div>");
        frames(page, &hit.backtrace);
        page.raw("</div></details>");
    }
}

fn vcpus(page: &mut Html, report: &Report) {
    page.raw("<div data-timing>\n");
    match &report.stop {
        Some(stop) if !stop.timing.vcpus.is_empty() => {
            let open = stop.timing.vcpus.len() <= OPEN_VCPUS;
            for vcpu in &stop.timing.vcpus {
                one_vcpu(page, vcpu, stop.vcpu == Some(vcpu.vcpu), open);
            }
        }
        _ => drop(
            page.element("p class=\"faint\"", "The guest ended without being stopped; its vCPUs were not looked at."),
        ),
    }
    page.raw("</div>\n");
}

fn one_vcpu(page: &mut Html, vcpu: &VcpuRecord, stopped_here: bool, open: bool) {
    page.raw(if open { "<details open><summary>" } else { "<details><summary>" });
    page.element("b", format_args!("vCPU {}", vcpu.vcpu)).raw(" ");
    if stopped_here {
        page.element("span class=\"mark bad\"", "stopped here").raw(" ");
    }
    page.text(&vcpu.activity).raw(" at ").element("code", &vcpu.at);
    page.raw(" <span class=\"faint\">").text(format_args!("ring {}", vcpu.ring));
    if !vcpu.interrupts {
        page.text(", interrupts off");
    }
    if vcpu.ran_on_us > 0 {
        page.text(format_args!(", ran on for {} \u{b5}s", vcpu.ran_on_us));
    }
    page.raw("</span></summary><div>\n<h3>Backtrace</h3>\n");
    if vcpu.backtrace.is_empty() {
        page.element("p class=\"faint\"", "none");
    } else {
        frames(page, &vcpu.backtrace);
    }
    if let Some(why) = &vcpu.backtrace_ends {
        page.element("p class=\"faint\"", format_args!("It ends there: {why}"));
    }
    page.raw("<h3>Registers</h3>\n<div class=\"registers mono\">");
    let known = |name: &str| REGISTERS.iter().position(|known| *known == name).unwrap_or(REGISTERS.len());
    let mut registers: Vec<_> = vcpu.registers.iter().collect();
    registers.sort_by_key(|(name, _)| known(name));
    for (name, value) in registers {
        page.raw("<span>").element("b", name).text(format_args!("{value:#018x}")).raw("</span>");
    }
    page.raw("</div></div></details>\n");
}

fn mark(page: &mut Html, class: &'static str, word: &str) {
    page.raw("<span class=\"mark ").raw(class).raw("\">").text(word).raw("</span>");
}

fn traps(page: &mut Html, report: &Report) {
    if report.traps.is_empty() {
        page.element("p class=\"faint\"", "No traps were set.");
        return;
    }
    page.raw(
        "<div class=\"wide\"><table><thead><tr><th>Outcome</th><th>Rule</th><th>Watches</th><th class=\"n\">Hits</th>",
    );
    page.raw("</tr></thead><tbody>\n");
    for trap in &report.traps {
        page.raw("<tr><td class=\"s\">");
        let class = match trap.outcome {
            Outcome::Passed => "good",
            Outcome::Fired | Outcome::Missed => "bad",
        };
        mark(page, class, words::outcome(trap.outcome));
        page.raw("</td><td class=\"t\">");
        if trap.name != trap.rule {
            page.element("b", &trap.name).raw("<br>");
        }
        page.element("code", &trap.rule).raw("</td><td class=\"t\">");
        for target in &trap.targets {
            page.raw("<div>").element("code", &target.what);
            if let Some(len) = target.len {
                page.text(format_args!(", {len} bytes"));
            }
            page.raw(" ").element("span class=\"faint\"", &target.mechanism).raw("</div>");
        }
        let hits = trap.timing.hits.iter().fold(0u64, |sum, hits| sum.saturating_add(*hits));
        page.raw("</td><td class=\"n\"><span data-timing>").text(hits).raw("</span></td></tr>\n");
    }
    page.raw("</tbody></table></div>\n");
}

fn tests(page: &mut Html, report: &Report) {
    if report.tests.is_empty() {
        page.element("p class=\"faint\"", "The guest reported no tests (TAP, KTAP).");
        return;
    }
    page.element("p", words::tally(&report.tests));
    let bad: Vec<_> =
        report.tests.iter().filter(|test| matches!(test.result, TestResult::Failed | TestResult::Missing)).collect();
    if !bad.is_empty() {
        test_table(page, &bad);
    }
    page.raw(if report.tests.len() <= OPEN_TESTS { "<details open>" } else { "<details>" });
    page.element("summary", format_args!("All lines of tests: {}", report.tests.len())).raw("<div>");
    test_table(page, &report.tests.iter().collect::<Vec<_>>());
    page.raw("</div></details>\n");
}

fn test_table(page: &mut Html, tests: &[&TestRecord]) {
    page.raw("<div class=\"wide\"><table><tbody>\n");
    for test in tests {
        page.raw("<tr><td class=\"s\">");
        let class = match test.result {
            TestResult::Ok => "good",
            TestResult::Failed | TestResult::Missing => "bad",
            TestResult::Todo => "warn",
            TestResult::Skipped => "none",
        };
        mark(page, class, words::result(test.result));
        page.raw("</td><td class=\"t\">");
        for suite in &test.suite {
            page.element("span class=\"faint\"", format_args!("{suite} / "));
        }
        page.text(words::test_name(test));
        if let Some(message) = &test.message {
            page.element("pre", message);
        }
        page.raw("</td></tr>\n");
    }
    page.raw("</tbody></table></div>\n");
}

/// The number of the console's line that is marked, if it is among those that are shown.
fn marked_line(report: &Report) -> Option<u64> {
    let timing = &report.timing;
    let shown = timing.console.len() as u64;
    timing.console_line.filter(|line| (1..=shown).contains(&line.saturating_sub(timing.console_lines_before)))
}

fn console(page: &mut Html, report: &Report) {
    let timing = &report.timing;
    page.raw("<div data-timing>\n");
    if timing.console.is_empty() {
        page.element("p class=\"faint\"", "The guest printed nothing.").raw("</div>\n");
        return;
    }
    page.raw("<div class=\"console mono\" tabindex=\"0\">");
    if timing.console_lines_before > 0 {
        let before = timing.console_lines_before;
        page.element(
            "p",
            format_args!("{before} lines went before these; all are in the console's log, if one was kept."),
        );
    }
    for (line, number) in timing.console.iter().zip(1u64..) {
        let number = timing.console_lines_before.saturating_add(number);
        page.raw(if marked_line(report) == Some(number) { "<div id=\"marked\">" } else { "<div>" });
        page.element("span class=\"no\"", number).element("span class=\"no\"", words::seconds(line.at_ms));
        page.element("span", &line.text).raw("</div>");
    }
    page.raw("</div>\n</div>\n");
}

fn input(page: &mut Html, report: &Report) {
    let input = &report.input;
    page.raw("<dl>");
    let mut code = |label: &'static str, value: &str| {
        if !value.is_empty() {
            page.raw("<dt>").raw(label).raw("</dt><dd>").element("code", value).raw("</dd>");
        }
    };
    code("Kernel", &input.kernel);
    code("Release", input.release.as_deref().unwrap_or_default());
    code("Build ID", input.build_id.as_deref().unwrap_or_default());
    code("Initrd", input.initrd.as_deref().unwrap_or_default());
    code("Command line", &input.cmdline);
    code("Symbols", &input.symbols.join(" "));
    row(page, "Machine", &format!("{} vCPUs, {} MiB, {}", input.cpus, input.memory >> 20, input.kvm));
    if let Some(timeout) = input.timeout_ms {
        row(page, "Timeout", &words::seconds(timeout));
    }
    if !report.files.is_empty() {
        page.raw("<dt>Files</dt><dd>");
        for (what, file) in &report.files {
            // The dot makes it a path, whatever its name begins with.
            page.raw("<a href=\"./").text(file).raw("\">").text(what).raw("</a> ");
        }
        page.raw("</dd>");
    }
    page.raw("</dl>\n");
    if !report.problems.is_empty() {
        page.raw("<h3>Problems</h3>\n<ul class=\"problems warn\">");
        for problem in &report.problems {
            page.element("li", problem);
        }
        page.raw("</ul>\n");
    }
}
