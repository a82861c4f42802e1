//! `serenity-gpu-check`: compares every operation of the CUDA engine with a plain CPU computation, on the device of this machine.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serenity_cuda::check::{Check, Row, Section, sections};
use serenity_cuda::{Arena, Gpu};
use serenity_protocol::{Error, Result};

/// Checks the CUDA engine against plain CPU computations
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Sections to run; all if none is named
    sections: Vec<String>,
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Name the sections and stop
    #[arg(long)]
    list: bool,
    /// The device, in the driver's order
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Device memory to work in, MiB
    #[arg(long, default_value_t = 6144)]
    memory: usize,
    /// Folder for the file that copies are measured from
    #[arg(long, default_value = "/dev/shm")]
    scratch: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.list {
        sections().iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

/// Whether all checks passed.
fn run(cli: &Cli) -> Result<bool> {
    let chosen = choose(&cli.sections)?;
    let started = std::time::Instant::now();
    let gpu = Gpu::open(cli.device)?;
    let opened = started.elapsed();
    let arena = Arena::new(&gpu, cli.memory << 20)?;
    if !cli.json {
        describe(&gpu, opened)?;
    }
    let mut check = Check::new(&gpu, &arena, cli.scratch.clone())?;
    let mut alive = true;
    let mut shown = 0;
    if !cli.json {
        println!("{:<10} {:<58} {:>9} {:>9}  {:<4} {:>10}  rate", "section", "case", "error", "limit", "", "us");
    }
    for section in chosen {
        if alive {
            alive = check.run(section);
        } else {
            check.not_run(section);
        }
        for row in check.rows.iter().skip(shown) {
            show(row, cli.json)?;
        }
        shown = check.rows.len();
    }
    let failed = check.rows.iter().filter(|r| !r.ok).count();
    if !cli.json {
        println!("{} cases, {failed} failed; arena high water {} MiB; {:?}", check.rows.len(), arena.high_water() >> 20, gpu.memory().ok());
        for row in check.rows.iter().filter(|r| !r.ok) {
            println!("FAIL {} {}: {}", row.section, row.case, row.problem.as_deref().unwrap_or("error above the limit"));
        }
    }
    Ok(failed == 0)
}

fn choose(names: &[String]) -> Result<Vec<Section>> {
    let all = sections();
    if let Some(unknown) = names.iter().find(|n| all.iter().all(|(name, _)| name != n)) {
        let known: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        return Err(Error::config(format!("there is no section {unknown}")).expected(known.join(", ")));
    }
    Ok(all.into_iter().filter(|(name, _)| names.is_empty() || names.iter().any(|n| n == name)).collect())
}

fn describe(gpu: &Gpu, opened: std::time::Duration) -> Result<()> {
    let p = gpu.properties();
    let compiler = serenity_cuda::nvrtc::version()?;
    println!(
        "{}, compute capability {}.{}, {} multiprocessors, {} MiB, L2 {} MiB, driver {}.{}, nvrtc {}.{}, cuBLASLt {}; opened in {:.1} s",
        p.name,
        p.capability / 10,
        p.capability % 10,
        p.multiprocessors,
        p.memory_bytes >> 20,
        p.l2_bytes >> 20,
        p.driver.0,
        p.driver.1,
        compiler.0,
        compiler.1,
        gpu.blas_version(),
        opened.as_secs_f64(),
    );
    Ok(())
}

fn show(row: &Row, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(row).map_err(|e| Error::invariant("a line cannot be written").cause(e))?);
        return Ok(());
    }
    let number = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.1e}"));
    println!(
        "{:<10} {:<58} {:>9} {:>9}  {:<4} {:>10}  {}",
        row.section,
        row.case,
        number(row.error),
        number(row.limit),
        if row.ok { "ok" } else { "FAIL" },
        row.micros.map_or(String::new(), |m| format!("{m:.1}")),
        row.rate.as_deref().unwrap_or_default(),
    );
    Ok(())
}
