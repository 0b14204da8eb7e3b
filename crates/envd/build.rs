//! Compiles the protocol without `protoc`: protox reads the files, connectrpc writes the code.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let files = ["filesystem/filesystem.proto", "process/process.proto"];
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::Compiler::new(["proto"])?
        .include_imports(true)
        .include_source_info(true)
        .open_files(files)?
        .encode_file_descriptor_set();
    let set = out.join("envd.binpb");
    std::fs::write(&set, descriptors)?;
    // connectrpc has cargo look whether it has changed, and what is newer than the build has.
    std::fs::File::options().write(true).open(&set)?.set_modified(std::time::UNIX_EPOCH)?;
    connectrpc_build::Config::new()
        .descriptor_set(&set)
        .files(&files)
        .include_file("envd.rs")
        .compile()?;
    Ok(())
}
