//! The command-line flags that change a configuration, the same for every program.

use std::ffi::OsString;
use std::path::PathBuf;

use super::Overrides;

/// Flags shared by the launcher and its children; `#[command(flatten)]` them.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct OverrideArgs {
    /// Folder of images with a caption file beside each; replaces data.concepts
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Optimiser steps in the run; replaces max_steps
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// What to go on from: auto (the newest checkpoint in the output folder), never, or a checkpoint
    #[arg(long, value_name = "auto|never|PATH")]
    pub resume: Option<String>,
    /// Change one key of the configuration, e.g. --set memory.stagehand.pinned_pool_mb=4096 (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl From<OverrideArgs> for Overrides {
    fn from(args: OverrideArgs) -> Self {
        Self { data: args.data, steps: args.steps, resume: args.resume, set: args.set }
    }
}

impl Overrides {
    /// The same overrides as arguments for a child process.
    #[must_use]
    pub fn to_args(&self) -> Vec<OsString> {
        let mut all = Vec::new();
        let mut push = |flag: &str, value: OsString| {
            // One word, so that a value that begins with a dash is not taken for a flag.
            let mut word = OsString::from(flag);
            word.push("=");
            word.push(value);
            all.push(word);
        };
        if let Some(data) = &self.data {
            push("--data", data.into());
        }
        if let Some(steps) = self.steps {
            push("--steps", steps.to_string().into());
        }
        if let Some(resume) = &self.resume {
            push("--resume", resume.into());
        }
        for assignment in &self.set {
            push("--set", assignment.into());
        }
        all
    }
}
