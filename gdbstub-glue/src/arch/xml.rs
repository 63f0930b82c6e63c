//! `target.xml`, made from the register table (gdb manual, "Target Description Format").

use std::fmt::Write as _;
use std::sync::OnceLock;

use super::table::{Entry, Feature, TABLE};

/// The description of a vCPU. Always 64-bit: gdb cannot change the architecture within a session.
pub(crate) fn target_xml() -> &'static str {
    static XML: OnceLock<String> = OnceLock::new();
    XML.get_or_init(build)
}

/// A type whose bits have names, and the names: `(name, first bit, last bit)`.
struct Flags {
    id: &'static str,
    fields: &'static [(&'static str, u8, u8)],
}

const fn bit(name: &'static str, at: u8) -> (&'static str, u8, u8) {
    (name, at, at)
}

const EFLAGS: Flags = Flags {
    id: "i386_eflags",
    fields: &[
        bit("CF", 0),
        bit("", 1),
        bit("PF", 2),
        bit("AF", 4),
        bit("ZF", 6),
        bit("SF", 7),
        bit("TF", 8),
        bit("IF", 9),
        bit("DF", 10),
        bit("OF", 11),
        ("IOPL", 12, 13),
        bit("NT", 14),
        bit("RF", 16),
        bit("VM", 17),
        bit("AC", 18),
        bit("VIF", 19),
        bit("VIP", 20),
        bit("ID", 21),
    ],
};

const MXCSR: Flags = Flags {
    id: "i386_mxcsr",
    fields: &[
        bit("IE", 0),
        bit("DE", 1),
        bit("ZE", 2),
        bit("OE", 3),
        bit("UE", 4),
        bit("PE", 5),
        bit("DAZ", 6),
        bit("IM", 7),
        bit("DM", 8),
        bit("ZM", 9),
        bit("OM", 10),
        bit("UM", 11),
        bit("PM", 12),
        ("RC", 13, 14),
        bit("FZ", 15),
    ],
};

/// Four bytes wide, as are all our flags: gdb assigns a plain number to a flags register only if
/// both have the same size, and a number that one types is an int.
const SYSTEM: [Flags; 4] = [
    Flags {
        id: "cr0_flags",
        fields: &[
            bit("PE", 0),
            bit("MP", 1),
            bit("EM", 2),
            bit("TS", 3),
            bit("ET", 4),
            bit("NE", 5),
            bit("WP", 16),
            bit("AM", 18),
            bit("NW", 29),
            bit("CD", 30),
            bit("PG", 31),
        ],
    },
    Flags {
        id: "efer_flags",
        fields: &[
            bit("SCE", 0),
            bit("LME", 8),
            bit("LMA", 10),
            bit("NXE", 11),
            bit("SVME", 12),
            bit("LMSLE", 13),
            bit("FFXSR", 14),
            bit("TCE", 15),
            bit("AUTOIBRS", 21),
        ],
    },
    Flags {
        id: "dr6_flags",
        fields: &[
            bit("B0", 0),
            bit("B1", 1),
            bit("B2", 2),
            bit("B3", 3),
            bit("BLD", 11),
            bit("BD", 13),
            bit("BS", 14),
            bit("BT", 15),
            bit("RTM", 16),
        ],
    },
    Flags {
        id: "dr7_flags",
        fields: &[
            bit("L0", 0),
            bit("G0", 1),
            bit("L1", 2),
            bit("G1", 3),
            bit("L2", 4),
            bit("G2", 5),
            bit("L3", 6),
            bit("G3", 7),
            bit("LE", 8),
            bit("GE", 9),
            bit("RTM", 11),
            bit("GD", 13),
            ("RW0", 16, 17),
            ("LEN0", 18, 19),
            ("RW1", 20, 21),
            ("LEN1", 22, 23),
            ("RW2", 24, 25),
            ("LEN2", 26, 27),
            ("RW3", 28, 29),
            ("LEN3", 30, 31),
        ],
    },
];

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
        Feature::System => SYSTEM.iter().for_each(|f| flags(f, xml)),
    }
}

fn flags(flags: &Flags, xml: &mut String) {
    let _ = writeln!(xml, "<flags id=\"{}\" size=\"4\">", flags.id);
    for (name, first, last) in flags.fields {
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
        for flags in SYSTEM.iter().chain([&EFLAGS, &MXCSR]) {
            let mut taken = 0u32;
            for &(name, first, last) in flags.fields {
                let mask = (u32::MAX >> (31 - (last - first))) << first;
                assert_eq!(taken & mask, 0, "{} of {}", name, flags.id);
                taken |= mask;
            }
        }
    }
}
