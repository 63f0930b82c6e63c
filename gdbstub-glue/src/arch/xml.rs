//! `target.xml`, made from the register table (gdb manual, "Target Description Format").

use std::fmt::Write as _;
use std::sync::OnceLock;

use super::flags::{CR0, DR6, DR7, EFER, EFLAGS, Flags, MXCSR};
use super::table::{Entry, Feature, TABLE};

/// The description of a vCPU. Always 64-bit: gdb cannot change the architecture within a session.
pub(crate) fn target_xml() -> &'static str {
    static XML: OnceLock<String> = OnceLock::new();
    XML.get_or_init(build)
}

fn build() -> String {
    let mut xml = String::from(concat!(
        "<?xml version=\"1.0\"?>\n",
        "<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n",
        "<target version=\"1.0\">\n",
        "<architecture>i386:x86-64</architecture>\n",
    ));
    for (feature, name) in [
        (Feature::Core, "org.gnu.gdb.i386.core"),
        (Feature::Sse, "org.gnu.gdb.i386.sse"),
        (Feature::Segments, "org.gnu.gdb.i386.segments"),
        (Feature::System, "org.trapline.x86.system"),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(xml, "<feature name=\"{name}\">");
        types(feature, &mut xml);
        TABLE.iter().filter(|e| e.feature == feature).for_each(|e| register(e, &mut xml));
        xml.push_str("</feature>\n");
    }
    xml.push_str("</target>\n");
    xml
}

fn types(feature: Feature, xml: &mut String) {
    match feature {
        Feature::Core => flags(&EFLAGS, xml),
        Feature::Sse => {
            for (id, element, count) in [
                ("v4f", "ieee_single", 4),
                ("v2d", "ieee_double", 2),
                ("v16i8", "int8", 16),
                ("v8i16", "int16", 8),
                ("v4i32", "int32", 4),
                ("v2i64", "int64", 2),
            ] {
                let _ = writeln!(xml, "<vector id=\"{id}\" type=\"{element}\" count=\"{count}\"/>");
            }
            xml.push_str("<union id=\"vec128\">\n");
            for (name, kind) in [
                ("v4_float", "v4f"),
                ("v2_double", "v2d"),
                ("v16_int8", "v16i8"),
                ("v8_int16", "v8i16"),
                ("v4_int32", "v4i32"),
                ("v2_int64", "v2i64"),
                ("uint128", "uint128"),
            ] {
                let _ = writeln!(xml, "<field name=\"{name}\" type=\"{kind}\"/>");
            }
            xml.push_str("</union>\n");
            flags(&MXCSR, xml);
        }
        Feature::Segments => {}
        Feature::System => [CR0, EFER, DR6, DR7].iter().for_each(|f| flags(f, xml)),
    }
}

/// Four bytes wide, all of them: gdb assigns a plain number to a flags register only if both have
/// the same size, and a number that one types is an int.
fn flags(flags: &Flags, xml: &mut String) {
    let _ = writeln!(xml, "<flags id=\"{}\" size=\"4\">", flags.id);
    // gdb prints a field of several bits even if it is zero: noise on every line.
    for (name, first, last) in flags.fields.iter().filter(|(_, first, last)| first == last) {
        let _ = writeln!(xml, "<field name=\"{name}\" start=\"{first}\" end=\"{last}\"/>");
    }
    xml.push_str("</flags>\n");
}

fn register(entry: &Entry, xml: &mut String) {
    let _ = write!(xml, "<reg name=\"{}\" bitsize=\"{}\" type=\"{}\"", entry.name, entry.bits, entry.kind);
    if let Some(group) = entry.group {
        let _ = write!(xml, " group=\"{group}\"");
    }
    // A function call from the gdb prompt saves and restores registers; these are not the
    // function's business, and writing them has effects.
    if entry.feature == Feature::System {
        xml.push_str(" save-restore=\"no\"");
    }
    xml.push_str("/>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_xml_as_it_stands() {
        insta::assert_snapshot!(target_xml());
    }

    #[test]
    fn every_type_is_defined() {
        let xml = target_xml();
        let known = ["int", "int32", "int64", "uint32", "uint64", "data_ptr", "code_ptr", "i387_ext"];
        for entry in TABLE {
            // gdb gives up on the whole description for one unknown type.
            assert!(known.contains(&entry.kind) || xml.contains(&format!(" id=\"{}\"", entry.kind)), "{}", entry.kind);
        }
    }

    #[test]
    fn names_of_flags_do_not_overlap() {
        for flags in [CR0, EFER, DR6, DR7, EFLAGS, MXCSR] {
            let mut taken = 0u32;
            for &(name, first, last) in flags.fields {
                let mask = (u32::MAX >> (31 - (last - first))) << first;
                assert_eq!(taken & mask, 0, "{} of {}", name, flags.id);
                taken |= mask;
            }
        }
    }
}
