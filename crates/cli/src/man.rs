//! `denizen man`: manual pages, made of what `--help` is made of, so that they say the same.

use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::{Cli, Failure, Result};

/// Exit statuses, as they are told in all places.
pub const EXITS: [(&str, &str); 6] = [
    ("0", "It was done; for exec and shell: the command ended with this."),
    (
        "1",
        "doctor has found what keeps denizen from working, or backups verify what is wrong with \
         backups.",
    ),
    ("124", "The command of exec ran into its --timeout, and was killed."),
    ("125", "denizen itself failed, or was called in a way that it does not know."),
    ("126", "The command cannot be executed."),
    ("127", "The command was not found."),
];

const SIGNALS: &str = "For exec and shell all others are those of the command; 128 and the \
                       signal's number if a signal ended it. 130: interrupted.";

/// Writes a page for the program and for each of its verbs into a folder, which is made.
pub fn write(folder: &Path) -> Result<()> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| Failure::new(format!("{path}: {error}"))
    };
    fs::create_dir_all(folder).map_err(failed(folder))?;
    let mut program = Cli::command();
    program.build();
    let mut pages = vec![(program.get_name().to_owned(), program)];
    while let Some((name, command)) = pages.pop() {
        for verb in
            command.get_subcommands().filter(|it| !it.is_hide_set() && it.get_name() != "help")
        {
            pages.push((format!("{name}-{}", verb.get_name()), verb.clone()));
        }
        let path = folder.join(format!("{name}.1"));
        let page = page(&name, command).map_err(failed(&path))?;
        fs::write(&path, page).map_err(failed(&path))?;
    }
    Ok(())
}

fn page(name: &str, command: Command) -> std::io::Result<Vec<u8>> {
    // Once for each page is too often for what holds for all verbs.
    let is_program = command.get_name() == name;
    let command = command.mut_subcommands(|verb| {
        let is_help = verb.get_name() == "help";
        verb.hide(is_help)
    });
    let command = command.mut_args(|arg| {
        let is_setting = arg.get_help_heading() == Some("Settings");
        arg.hide(is_setting && !is_program)
    });
    let of_settings = "The settings that all verbs have are told in denizen(1).";
    let man = Man::new(command.clone())
        .title(name)
        .section("1")
        .source(concat!("denizen ", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.get_subcommands().any(|verb| !verb.is_hide_set()) {
        man.render_subcommands_section(&mut page)?;
    }
    let mut rest = Roff::new();
    if is_program {
        rest.control("SH", ["EXIT STATUS"]);
        for (code, what) in EXITS {
            rest.control("TP", []).text([bold(code)]).text([roman(what)]);
        }
        rest.control("PP", []).text([roman(SIGNALS)]);
    } else {
        if let Some(examples) = command.get_after_help() {
            let text = examples.to_string();
            let text = text.strip_prefix("Examples:\n").unwrap_or(&text);
            rest.control("SH", ["EXAMPLES"]).control("nf", []);
            rest.text(text.lines().map(|line| roman(format!("{line}\n"))).collect::<Vec<_>>());
            rest.control("fi", []);
        }
        rest.control("SH", ["SEE ALSO"]).text([bold("denizen"), roman("(1)")]);
        rest.control("PP", []).text([roman(of_settings)]);
    }
    rest.to_writer(&mut page)?;
    Ok(page)
}
