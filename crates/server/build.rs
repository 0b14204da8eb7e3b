//! Writes a table of what is in `web/dist`, which the server embeds: empty, where the dashboard
//! was not built. It never builds it: `cargo build` works without npm.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let variable = |name: &str| env::var_os(name).map(PathBuf::from).ok_or(io::ErrorKind::NotFound);
    let dist = variable("CARGO_MANIFEST_DIR")?.join("../../web/dist");
    let out = variable("OUT_DIR")?;
    println!("cargo::rerun-if-changed={}", dist.display());
    let mut files = Vec::new();
    if dist.join("index.html").exists() {
        find(&dist, &mut files)?;
        files.sort();
    }
    let mut table = String::from("pub(super) const FILES: &[(&str, &[u8])] = &[\n");
    for (number, file) in files.iter().enumerate() {
        // A copy: the dashboard may be built anew before the compiler reads it.
        fs::copy(file, out.join(format!("web-{number}")))?;
        let name = file.strip_prefix(&dist).map_err(io::Error::other)?;
        // Written for debugging, a string is a literal.
        let name = name.to_string_lossy();
        let _ = writeln!(table, "    ({name:?}, include_bytes!(\"web-{number}\")),");
    }
    table.push_str("];\n");
    fs::write(out.join("web.rs"), table)
}

fn find(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if entry.file_name() != ".gitignore" {
            files.push(entry.path());
        }
    }
    Ok(())
}
