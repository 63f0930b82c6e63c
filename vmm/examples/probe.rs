fn main() {
    let t = std::time::Instant::now();
    let c = trapline_vmm::probe::capabilities_afresh();
    let d = t.elapsed();
    match c {
        Ok(c) => println!("{}", serde_json::to_string_pretty(&c).unwrap()),
        Err(e) => println!("{e}"),
    }
    println!("{d:?}");
    let t = std::time::Instant::now();
    let _ = trapline_vmm::probe::capabilities();
    println!("{:?}", t.elapsed());
}
