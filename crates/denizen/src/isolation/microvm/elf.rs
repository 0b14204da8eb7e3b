//! The little that has to be known of an ELF file (elf(5), 64 bits, little-endian). Whatever is
//! in a file, looking at it must not panic.

/// `e_shoff`, `e_shentsize`, `e_shnum`, `e_shstrndx`.
const SECTIONS: (usize, usize, usize, usize) = (0x28, 0x3a, 0x3c, 0x3e);
/// `e_phoff`, `e_phentsize`, `e_phnum`.
const SEGMENTS: (usize, usize, usize) = (0x20, 0x36, 0x38);
const PT_INTERP: u32 = 3;

/// The content of a section. None if there is no such section, or the file is damaged or no ELF.
pub(crate) fn section<'f>(file: &'f [u8], name: &str) -> Option<&'f [u8]> {
    is_elf(file).then_some(())?;
    let (offset, size, count, names) = SECTIONS;
    let (size, count) = (half(file, size)?, half(file, count)?);
    let header = |number: usize| {
        let at = long(file, offset)?.checked_add(number.checked_mul(size)?)?;
        file.get(at..at.checked_add(size)?)
    };
    let content = |header: &[u8]| {
        let at = long(header, 0x18)?;
        file.get(at..at.checked_add(long(header, 0x20)?)?)
    };
    let names = content(header(half(file, names)?)?)?;
    (0..count).map_while(header).find_map(|header| {
        let at = usize::try_from(word(header, 0)?).ok()?;
        let found = names.get(at..)?.strip_prefix(name.as_bytes())?.first() == Some(&0);
        if found { content(header) } else { None }
    })
}

/// Whether a program is started by a loader, which has to be there.
pub(crate) fn has_loader(file: &[u8]) -> bool {
    let (offset, size, count) = SEGMENTS;
    let look = || {
        let (size, count) = (half(file, size)?, half(file, count)?);
        let kind =
            |number: usize| word(file, long(file, offset)?.checked_add(number.checked_mul(size)?)?);
        Some((0..count).filter_map(kind).any(|kind| kind == PT_INTERP))
    };
    look().unwrap_or(false)
}

fn is_elf(file: &[u8]) -> bool {
    // The last two: 64 bits, little-endian.
    file.starts_with(b"\x7fELF\x02\x01")
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn half(from: &[u8], at: usize) -> Option<usize> {
    bytes(from, at).map(|bytes| u16::from_le_bytes(bytes).into())
}

fn word(from: &[u8], at: usize) -> Option<u32> {
    bytes(from, at).map(u32::from_le_bytes)
}

fn long(from: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(bytes(from, at)?)).ok()
}
