//! Gives a slab without our additions (the original builder's) our layout, checksums and companion, without quantising again.
//!
//! Codes and scales are copied, so the weights stay what they were; where the slab was built by the same rule, the result is byte for
//! byte what `build` makes of the original checkpoint. The tensors outside the blocks are not in such a slab: they come from the model.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Instant;

use serenity_protocol::model_path::{TransformerSource, resolve_path};
use serenity_protocol::process::Process;
use serenity_protocol::slab::Slab;
use serenity_protocol::{Error, Result};

use super::build::{self, BuildReport};
use super::companion::{self, CompanionPlan};
use super::files::{self, SlabFiles};
use super::model::{Model, Source};
use super::plan::{Content, SlabPlan};
use super::progress::{Progress, joined};
use super::writer::{FileHashes, FileWriter, check_free_space};

/// Bytes copied at once.
const BATCH_BYTES: u64 = 16 << 20;

/// Writes `slab` anew at `prefix`, with what it lacks from `model`.
///
/// # Errors
/// [`Error::Data`] if the slab is not of that model or its layers are padded differently; otherwise as [`build::build`].
pub fn repack(slab: &Slab, model: &str, prefix: &Path, process: &Process) -> Result<BuildReport> {
    let started = Instant::now();
    let source = TransformerSource::open(&resolve_path(model)?)?;
    let geometry = source.geometry().clone();
    slab.check_model(&geometry)?;
    let (model, source) = (Model::Transformer(geometry.clone()), Source::Transformer(source));
    let plan = SlabPlan::of(&model, pack_k(slab)?, geometry.other_linears().iter().any(|l| slab.layer_for(l).is_err()))?;
    let others = CompanionPlan::new(&model)?;
    let files = SlabFiles::of(prefix)?;
    std::fs::create_dir_all(files.folder()).map_err(|e| Error::io("cannot create the output folder", files.folder(), e))?;
    let same = |path: &Path| path.canonicalize().ok().is_some_and(|p| Some(p) == slab.path().canonicalize().ok());
    if same(&files.slab) {
        return Err(Error::config("--output names the slab that is to be repacked").at(&files.slab).advice("choose another --output"));
    }
    let _lock = files::lock(&files)?;
    let total = plan.file.file_bytes + others.file.file_bytes;
    check_free_space(files.folder(), total)?;
    let mut progress = Progress::new(process, "repack", total);
    let page_bytes = files::page_bytes_for(plan.file.file_bytes);
    let hashes = copy(slab, &plan, &files, page_bytes, &mut progress)?;
    let companion = companion::write(&others, &source, &files, &mut progress)?;
    let label = Some(slab.manifest().architecture_id.clone()).filter(|label| !label.is_empty());
    files::finish(&files, &build::assemble(&model, label, &plan, page_bytes, hashes, companion))?;
    Ok(BuildReport { layers: plan.linears.len(), bytes: total, resumed_bytes: 0, seconds: started.elapsed().as_secs_f64(), files })
}

/// The padding of the slab's columns, which must be the same for all layers.
fn pack_k(slab: &Slab) -> Result<usize> {
    let mut all: Vec<usize> = slab.manifest().layers.iter().map(|l| l.pad_k).collect();
    all.sort_unstable();
    all.dedup();
    match all.as_slice() {
        [one] => Ok(*one),
        several => Err(Error::data("the slab's layers are padded differently")
            .at(slab.manifest_path())
            .expected("one pad_k")
            .found(format!("{several:?}"))),
    }
}

fn copy(slab: &Slab, plan: &SlabPlan, files: &SlabFiles, page_bytes: u64, progress: &mut Progress) -> Result<FileHashes> {
    let mut writer = FileWriter::create(&plan.file, &files.partial, page_bytes)?;
    let file = File::open(slab.path()).map_err(|e| Error::io("cannot open the slab", slab.path(), e))?;
    std::thread::scope(|scope| {
        let (out, batches) = sync_channel::<Vec<u8>>(2);
        let reader = scope.spawn(move || read_all(slab, &file, plan, &out));
        let mut stopped = Ok(());
        for bytes in &batches {
            stopped = writer.write(&bytes).and_then(|()| progress.add(bytes.len() as u64));
            if stopped.is_err() {
                break;
            }
        }
        drop(batches);
        joined(reader.join())?;
        stopped?;
        writer.finish()
    })
}

/// Sends the new file's payload in order, until nobody listens any more.
fn read_all(slab: &Slab, file: &File, plan: &SlabPlan, out: &SyncSender<Vec<u8>>) -> Result<()> {
    for (tensor, content) in plan.file.tensors.iter().zip(&plan.contents) {
        let from: Option<Range<u64>> = match *content {
            Content::Codes(i) | Content::Scales(i) => {
                let (linear, _) = plan.linears.get(i).ok_or_else(|| Error::invariant("a linear outside the plan"))?;
                let layer = slab.layer_for(linear).map_err(|problem| Error::data(problem).at(slab.path()))?;
                Some(if matches!(content, Content::Codes(_)) { layer.qweight.clone() } else { layer.scale.clone() })
            }
            Content::ZeroPoints(_) | Content::Pad => None,
        };
        if from.as_ref().is_some_and(|r| r.end - r.start != tensor.bytes) {
            return Err(Error::invariant(format!("tensor '{}' of the slab has another length than planned", tensor.name)).at(slab.path()));
        }
        let mut at = 0;
        while at < tensor.bytes {
            let mut bytes = vec![0; BATCH_BYTES.min(tensor.bytes - at) as usize];
            if let Some(range) = &from {
                let offset = range.start + at;
                file.read_exact_at(&mut bytes, offset).map_err(|e| Error::io("cannot read the slab", slab.path(), e).offset(offset))?;
            }
            at += bytes.len() as u64;
            if out.send(bytes).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}
