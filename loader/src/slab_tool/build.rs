//! Checkpoint to slab, front to back, with a few batches of rows in memory.
//!
//! Three stages overlap: a thread reads batches of rows, the rayon pool quantises them, a thread hashes and writes. The file is written
//! in file order, so a journal needs only a position: at block borders the bytes so far are synced and the journal
//! (`PREFIX.build.partial`) says how far they go; a build that was killed goes on there and ends with the same bytes. The order at
//! the end is slab, companion, manifest: a manifest on the disk means that everything it names is whole.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serenity_protocol::checksum::Xxh3;
use serenity_protocol::geometry::TransformerGeometry;
use serenity_protocol::process::Process;
pub use serenity_protocol::slab::manifest::Component;
use serenity_protocol::slab::manifest::{self, Additions, Companion, Hash, Manifest};
use serenity_protocol::slab::quant;
use serenity_protocol::{Error, Result, atomic_file};

use super::companion::{self, CompanionPlan};
pub use super::files::{PAGE_BYTES, SlabFiles, page_bytes_for};
use super::files::{finish, lock, not_finite};
use super::model::{Model, Source};
use super::plan::{Content, SlabPlan};
use super::progress::{Progress, joined};
use super::source::{Batch, SourceReader, element_bytes};
use super::writer::{FileHashes, FileWriter, check_free_space};

/// Bytes between two entries in the journal.
pub const JOURNAL_BYTES: u64 = 64 << 20;
/// Batches between two stages.
const QUEUE: usize = 2;

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Folder, single file or hub id.
    pub model: String,
    /// Which part of the model.
    pub component: Component,
    /// Layers of a text encoder; those that the default embedding needs if not given.
    pub layers: Option<usize>,
    /// Path and name of the files without `.safetensors` and `.manifest.json`.
    pub output: PathBuf,
    /// Leave the linears outside the blocks out of the slab (they are in the companion anyway).
    pub blocks_only: bool,
    /// Columns are padded to a multiple of this.
    pub pack_k: usize,
    /// Label in the manifest; by geometry if not given.
    pub architecture_id: Option<String>,
    /// Page size of the hashes; by the file's size if not given.
    pub page_bytes: Option<u64>,
    /// Bytes between two points at which a killed build can be taken up, [`JOURNAL_BYTES`] by default; such points are block borders.
    pub journal_bytes: u64,
}

impl BuildOptions {
    /// The defaults for a model and an output prefix.
    #[must_use]
    pub fn new(model: impl Into<String>, output: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            component: Component::Transformer,
            layers: None,
            output: output.into(),
            blocks_only: false,
            pack_k: 64,
            architecture_id: None,
            page_bytes: None,
            journal_bytes: JOURNAL_BYTES,
        }
    }
}

/// What was built.
#[derive(Debug, Clone)]
pub struct BuildReport {
    /// The files.
    pub files: SlabFiles,
    /// Linears in the slab.
    pub layers: usize,
    /// Bytes of slab and companion.
    pub bytes: u64,
    /// Bytes of an earlier attempt that were kept.
    pub resumed_bytes: u64,
    /// Wall time.
    pub seconds: f64,
}

/// Builds slab, companion and manifest.
///
/// # Errors
/// [`Error::Absent`] without a model or while another build writes the same files, [`Error::Data`] for a checkpoint that is incomplete or holds
/// values that are no numbers, [`Error::TryAgain`] for a full disk or an interruption (the next run goes on).
pub fn build(options: &BuildOptions, process: &Process) -> Result<BuildReport> {
    let started = Instant::now();
    let source = Source::open(&options.model, options.component, options.layers)?;
    let model = source.model();
    let plan = SlabPlan::of(&model, options.pack_k, options.blocks_only)?;
    let others = CompanionPlan::new(&model)?;
    check_types(&source, &model)?;
    let page_bytes = options.page_bytes.unwrap_or_else(|| page_bytes_for(plan.file.file_bytes));
    if !page_bytes.is_power_of_two() || !(4096..=1 << 30).contains(&page_bytes) {
        return Err(Error::config("the page size must be a power of two from 4096 to 2^30").found(page_bytes));
    }
    let files = SlabFiles::of(&options.output)?;
    std::fs::create_dir_all(files.folder()).map_err(|e| Error::io("cannot create the output folder", files.folder(), e))?;
    let _lock = lock(&files)?;
    let kept = std::fs::metadata(&files.partial).map_or(0, |m| m.len());
    let total = plan.file.file_bytes + others.file.file_bytes;
    check_free_space(files.folder(), total.saturating_sub(kept))?;

    let mut progress = Progress::new(process, "slab", total);
    let identity = identity(&plan, page_bytes, &source)?;
    let resumed = resume_point(&files, &plan, identity);
    let resumed_bytes = resumed.as_ref().map_or(0, |j| plan.file.tensors.get(j.at_tensor).map_or(plan.file.file_bytes, |t| t.offset));
    if resumed_bytes > 0 {
        tracing::info!("going on with an earlier build at byte {resumed_bytes} of {}", plan.file.file_bytes);
    }
    progress.add(resumed_bytes)?;
    let hashes = write_slab(
        &Job { plan: &plan, source: &source, files: &files, page_bytes, identity, journal_bytes: options.journal_bytes },
        resumed,
        &mut progress,
    )?;
    let companion = companion::write(&others, &source, &files, &mut progress)?;
    let manifest = assemble(&model, options.architecture_id.clone(), &plan, page_bytes, hashes, companion);
    finish(&files, &manifest)?;
    Ok(BuildReport { layers: plan.linears.len(), bytes: total, resumed_bytes, seconds: started.elapsed().as_secs_f64(), files })
}

/// Refuses what the quantiser cannot read before anything is written.
fn check_types(source: &Source, model: &Model) -> Result<()> {
    for (name, shape) in model.all_tensors() {
        let place = source.place(&name, &shape)?;
        element_bytes(place.dtype).map_err(|e| e.at(&place.file).found(format!("'{name}' is {:?}", place.dtype)))?;
    }
    Ok(())
}

/// How far a build has come: everything before `at_tensor` is on the disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Journal {
    identity: Hash,
    at_tensor: usize,
    pages: Vec<Hash>,
    tensors: Vec<Hash>,
}

/// Names this build: same plan, same page size, same source files unchanged since.
fn identity(plan: &SlabPlan, page_bytes: u64, source: &Source) -> Result<Hash> {
    use std::os::unix::fs::MetadataExt;
    let mut hash = Xxh3::new();
    hash.update(&plan.file.header);
    hash.update(&page_bytes.to_le_bytes());
    for file in source.files() {
        let meta = std::fs::metadata(&file).map_err(|e| Error::io("cannot look at the checkpoint", &file, e))?;
        hash.update(file.as_os_str().as_encoded_bytes());
        for word in [meta.len(), meta.ino(), meta.mtime() as u64, meta.mtime_nsec() as u64] {
            hash.update(&word.to_le_bytes());
        }
    }
    Ok(Hash(hash.digest()))
}

/// The journal of an earlier attempt at this very build, if its file is there and long enough.
fn resume_point(files: &SlabFiles, plan: &SlabPlan, identity: Hash) -> Option<Journal> {
    let journal: Journal = serde_json::from_slice(&std::fs::read(&files.journal).ok()?).ok()?;
    let position = plan.file.tensors.get(journal.at_tensor)?.offset;
    let there = std::fs::metadata(&files.partial).ok()?.len();
    let fits = journal.identity == identity && there >= position && plan.block_starts.contains(&journal.at_tensor);
    fits.then_some(journal)
}

struct Job<'a> {
    plan: &'a SlabPlan,
    source: &'a Source,
    files: &'a SlabFiles,
    page_bytes: u64,
    identity: Hash,
    journal_bytes: u64,
}

/// From the quantiser to the writer.
enum Out {
    Codes(Vec<i8>),
    Bytes(Vec<u8>),
    Zeros(u64),
}

fn write_slab(job: &Job, resumed: Option<Journal>, progress: &mut Progress) -> Result<FileHashes> {
    let (plan, partial) = (&job.plan.file, &job.files.partial);
    let first = resumed.as_ref().map_or(0, |j| j.at_tensor);
    let writer = match resumed {
        Some(j) => FileWriter::resume(plan, partial, job.page_bytes, j.at_tensor, j.pages, j.tensors)?,
        None => {
            // A journal of the file that is about to be truncated must not outlive it.
            let _ = std::fs::remove_file(&job.files.journal);
            FileWriter::create(plan, partial, job.page_bytes)?
        }
    };
    std::thread::scope(|scope| {
        let (to_quantiser, batches) = sync_channel(QUEUE);
        let (to_writer, written) = sync_channel(QUEUE);
        let reader = scope.spawn(move || read_all(job, first, &to_quantiser));
        let writer = scope.spawn(move || write_all(job, writer, &written));
        let quantised = quantise_all(job, first, &batches, &to_writer, progress);
        // Ending the channels ends the threads; a thread's own error explains a broken channel and comes first.
        drop((batches, to_writer));
        let (read, hashes) = (joined(reader.join()), joined(writer.join()));
        let (hashes, written) = hashes.map_or_else(|e| (None, Err(e)), |h| (h, Ok(())));
        let mut errors: Vec<Error> = [quantised, read, written].into_iter().filter_map(Result::err).collect();
        // A stage that lost its neighbour reports an invariant; the neighbour's own error says why.
        errors.sort_by_key(|e| matches!(e, Error::Invariant(_)));
        match errors.into_iter().next() {
            Some(error) => Err(error),
            None => hashes.ok_or_else(|| Error::invariant("the slab's writer ended early")),
        }
    })
}

fn read_all(job: &Job, first: usize, out: &SyncSender<Batch>) -> Result<()> {
    let mut reader = SourceReader::default();
    for content in job.plan.contents.iter().skip(first) {
        let Content::Codes(index) = content else { continue };
        let Some((linear, _)) = job.plan.linears.get(*index) else { continue };
        let place = job.source.place(&format!("{}.weight", linear.name), &[linear.out_features, linear.in_features])?;
        let mut closed = false;
        reader.batches(&place, linear.out_features, linear.in_features, |batch| {
            closed = closed || out.send(batch).is_err();
            if closed { Err(Error::invariant("the quantiser ended early")) } else { Ok(()) }
        })?;
    }
    Ok(())
}

fn write_all(job: &Job, mut writer: FileWriter, work: &Receiver<Out>) -> Result<Option<FileHashes>> {
    let mut noted = writer.position();
    for out in work {
        match out {
            Out::Codes(codes) => writer.write(bytemuck::cast_slice(&codes))?,
            Out::Bytes(bytes) => writer.write(&bytes)?,
            Out::Zeros(count) => writer.write_zeros(count)?,
        }
        let at = writer.at_tensor();
        let at_border = job.plan.file.tensors.get(at).is_some_and(|t| t.offset == writer.position()) && job.plan.block_starts.contains(&at);
        if at_border && writer.position() - noted >= job.journal_bytes {
            writer.sync()?;
            let FileHashes { pages, tensors, .. } = writer.hashes().clone();
            let journal = Journal { identity: job.identity, at_tensor: at, pages, tensors };
            let text = serde_json::to_vec(&journal).map_err(|e| Error::invariant("a journal cannot be written as JSON").cause(e))?;
            atomic_file::write(&job.files.journal, &text)?;
            noted = writer.position();
        }
    }
    // The quantiser hung up before the end: its error is the one to report.
    if writer.position() != job.plan.file.file_bytes {
        return Ok(None);
    }
    writer.finish().map(Some)
}

fn quantise_all(job: &Job, first: usize, batches: &Receiver<Batch>, out: &SyncSender<Out>, progress: &mut Progress) -> Result<()> {
    // Scales of the linears whose codes are written and whose scales are not yet.
    let mut scales: Vec<Vec<f32>> = vec![Vec::new(); job.plan.linears.len()];
    for (tensor, content) in job.plan.file.tensors.iter().zip(&job.plan.contents).skip(first) {
        let mut send = |item: Out, bytes: u64| {
            out.send(item).map_err(|_| Error::invariant("the slab's writer ended early"))?;
            progress.add(bytes)
        };
        match *content {
            Content::Codes(index) => {
                let mut all = Vec::new();
                let mut rows = 0;
                while rows < tensor.shape.first().copied().unwrap_or(0) {
                    let batch = batches.recv().map_err(|_| Error::invariant("the checkpoint's reader ended early"))?;
                    rows += batch.rows;
                    let codes = quantise_batch(job, index, &batch, &mut all)?;
                    let count = codes.len() as u64;
                    send(Out::Codes(codes), count)?;
                }
                if let Some(slot) = scales.get_mut(index) {
                    *slot = all;
                }
            }
            Content::Scales(index) => {
                let values = scales.get_mut(index).map(std::mem::take).unwrap_or_default();
                send(Out::Bytes(values.iter().flat_map(|v| v.to_le_bytes()).collect()), tensor.bytes)?;
            }
            Content::ZeroPoints(_) | Content::Pad => send(Out::Zeros(tensor.bytes), tensor.bytes)?,
        }
    }
    Ok(())
}

/// The codes of a batch of rows of linear `index`; its scales are appended to `scales`.
fn quantise_batch(job: &Job, index: usize, batch: &Batch, scales: &mut Vec<f32>) -> Result<Vec<i8>> {
    let _span = tracing::trace_span!("quantise").entered();
    let (linear, layer) = job.plan.linears.get(index).ok_or_else(|| Error::invariant("a linear outside the plan"))?;
    let name = format!("{}.weight", linear.name);
    let place = job.source.place(&name, &[linear.out_features, linear.in_features])?;
    let (row_bytes, padded) = (linear.in_features * element_bytes(place.dtype)?, layer.packed_shape[1]);
    let mut codes = vec![0i8; batch.rows * padded];
    let first = scales.len();
    scales.resize(first + batch.rows, 0.0);
    let rows =
        codes.par_chunks_exact_mut(padded).zip(scales.get_mut(first..).unwrap_or_default()).zip(batch.bytes().par_chunks_exact(row_bytes));
    let bad = rows.enumerate().with_min_len(16).map_init(Vec::new, |row: &mut Vec<f32>, (i, ((codes, scale), bytes))| {
        row.clear();
        // Only the types of element_bytes come here, and those cannot fail.
        let converted = place.append_f32((batch.row + i) * linear.in_features, linear.in_features, bytes, row).is_ok();
        if !converted || !quant::all_finite(row) {
            return Some((i, row.iter().position(|v| !v.is_finite()).unwrap_or(0)));
        }
        *scale = quant::quantize_row(row, codes);
        None
    });
    if let Some((i, column)) = bad.flatten().min() {
        return Err(not_finite(&name, batch.row + i, column, &place.file));
    }
    Ok(codes)
}

/// The manifest of a written slab.
pub(super) fn assemble(
    model: &Model,
    label: Option<String>,
    plan: &SlabPlan,
    page_bytes: u64,
    hashes: FileHashes,
    companion: Companion,
) -> Manifest {
    let mut layers: Vec<_> = plan.linears.iter().map(|(_, layer)| layer.clone()).collect();
    layers.sort_by(|a, b| a.canonical_name.cmp(&b.canonical_name));
    let total = layers.iter().map(|l| l.packed_shape[0] as u64 * l.packed_shape[1] as u64).sum();
    let tensors = plan.file.tensors.iter().zip(hashes.tensors).map(|(t, hash)| (t.name.clone(), hash)).collect();
    let (geometry, text_encoder) = match model {
        Model::Transformer(geometry) => {
            let out_channels = geometry.out_channels.filter(|&n| n != geometry.in_channels);
            (Some(TransformerGeometry { out_channels, ..geometry.clone() }), None)
        }
        Model::TextEncoder(shape) => (None, Some(shape.clone())),
    };
    Manifest {
        model_signature: manifest::model_signature(&model.all_linears()),
        architecture_id: label.unwrap_or_else(|| model.architecture_id().to_owned()),
        quant_version: manifest::QUANT_VERSION.into(),
        kernel_abi_version: manifest::KERNEL_ABI_VERSION,
        min_runtime_version: "0.1.0".into(),
        layer_count: Some(layers.len() as u64),
        total_qweight_bytes: Some(total),
        layers,
        serenity: Some(Additions {
            format: model.component().format(),
            component: model.component(),
            // Set when the text is made.
            manifest_xxh3: Hash(0),
            geometry,
            text_encoder,
            file_bytes: plan.file.file_bytes,
            header_xxh3: Hash(serenity_protocol::checksum::xxh3_64(&plan.file.header)),
            page_bytes,
            page_xxh3: hashes.pages,
            tensor_xxh3: tensors,
            companion: Some(companion),
        }),
    }
}
