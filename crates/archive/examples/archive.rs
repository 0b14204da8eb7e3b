//! Writes, checks or restores one archive from the command line; times each.
//!
//! `archive write VOLUME DESTINATION`, `archive verify FILE`, `archive restore FILE INTO`

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let never = AtomicBool::new(false);
    let start = Instant::now();
    let done = match arguments[..] {
        ["write", volume, destination] => denizen_archive::write(
            Path::new(volume),
            Path::new(destination),
            uuid::Uuid::nil(),
            jiff::Timestamp::now(),
            &never,
        )
        .map(|written| format!("{written:?}")),
        ["verify", file] => {
            denizen_archive::verify(Path::new(file)).map(|summary| format!("{summary:?}"))
        }
        ["restore", file, into] => {
            denizen_archive::restore(Path::new(file), Path::new(into), &never)
                .map(|restored| format!("{restored:?}"))
        }
        _ => {
            eprintln!("usage: archive write VOLUME DESTINATION | verify FILE | restore FILE INTO");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(text) => {
            println!("{:.3} s: {text}", start.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
