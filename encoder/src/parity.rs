//! One computation in float32, for comparison with the reference's tensors.

use std::borrow::Cow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::View;
use serde::Deserialize;
use serenity_cuda::Ty;
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::config::DeviceKind;
use serenity_protocol::{Error, Result, atomic_file, model_path};

use crate::pixels::normalise;
use crate::tensor::failed;
use crate::text::AnyTextEncoder;
use crate::tokenizer::{SYSTEM_MESSAGE, Tokenizer, Tokens};
use crate::vae::{Half, Place, Vae};

/// A named result: type, shape, little-endian bytes.
struct Output {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for &Output {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

impl Output {
    fn floats(tensor: &Tensor) -> Result<Self> {
        let values = tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).map_err(failed("reading a result"))?;
        Ok(Self { dtype: Dtype::F32, shape: tensor.dims().to_vec(), bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() })
    }

    fn integers(rows: &[Vec<i64>]) -> Self {
        let columns = rows.first().map_or(0, Vec::len);
        Self { dtype: Dtype::I64, shape: vec![rows.len(), columns], bytes: rows.iter().flatten().flat_map(|v| v.to_le_bytes()).collect() }
    }
}

fn write(out: &Path, tensors: &[(&str, Output)]) -> Result<()> {
    let views = tensors.iter().map(|(name, output)| (*name, output));
    let bytes = safetensors::serialize(views, None).map_err(|e| Error::invariant("the results cannot be serialised").cause(e))?;
    atomic_file::write(out, &bytes)
}

/// The case of [`text`].
#[derive(Deserialize)]
struct TextCase {
    prompts: Vec<String>,
    max_length: usize,
    hidden_state_indices: [usize; 3],
    system_message: Option<String>,
}

fn part<'a>(path: Option<&'a Path>, what: &str, model: &Path) -> Result<&'a Path> {
    path.ok_or_else(|| Error::absent(format!("the model has no {what}")).at(model))
}

/// Text embeddings of the prompts in the JSON `case`: `input_ids` and `attention_mask` `[B, max_length]` (I64), `embeds`
/// `[B, max_length, 3 * hidden]` (F32), left-padded, pad rows included.
///
/// # Errors
/// [`Error::Data`] for a malformed case; what loading and encoding report.
pub fn text(model: &Path, case: &Path, out: &Path) -> Result<()> {
    text_on(TextPlace { device: DeviceKind::Cpu, ty: Ty::F32 }, model, case, out)
}

/// Where the text encoder computes for comparison, and in what.
#[derive(Debug, Clone, Copy)]
pub struct TextPlace {
    /// The device.
    pub device: DeviceKind,
    /// float32 or bf16.
    pub ty: Ty,
}

/// [`text`] on any device and in either type.
///
/// # Errors
/// As [`text`]; [`Error::Absent`] without the device.
pub fn text_on(place: TextPlace, model: &Path, case: &Path, out: &Path) -> Result<()> {
    let json = std::fs::read_to_string(case).map_err(|e| Error::io("cannot read the case", case, e))?;
    let case_of = |e| Error::data("the case is malformed").at(case).cause(e).expected("prompts, max_length, three hidden_state_indices");
    let c: TextCase = serde_json::from_str(&json).map_err(case_of)?;
    if c.system_message.as_deref().is_some_and(|m| m != SYSTEM_MESSAGE) {
        return Err(Error::data("the case was made with another system message").at(case).expected(SYSTEM_MESSAGE));
    }
    let paths = model_path::resolve_path(&model.to_string_lossy())?;
    let tokenizer = Tokenizer::open(part(paths.tokenizer.as_deref(), "tokenizer", model)?)?;
    let folder = part(paths.text_encoder.as_deref(), "text encoder", model)?;
    let encoder = AnyTextEncoder::open(folder, place.device, Some(place.ty), None, None)?;
    let captions = c.prompts.iter().map(|p| tokenizer.encode(p, c.max_length)).collect::<Result<Vec<_>>>()?;
    let encoded = encoder.encode(&captions, tokenizer.pad_id(), c.hidden_state_indices, c.max_length, DType::F32, &mut |_, _| Ok(()))?;
    let (mut ids, mut mask, mut embeds) = (Vec::new(), Vec::new(), Vec::new());
    for (tokens, embedding) in captions.iter().zip(&encoded.captions) {
        let pads = c.max_length.saturating_sub(tokens.ids.len());
        let real = tokens.ids.iter().map(|&id| i64::from(id));
        ids.push(std::iter::repeat_n(i64::from(tokenizer.pad_id()), pads).chain(real).collect());
        mask.push((0..c.max_length).map(|i| i64::from(i >= pads)).collect());
        let features = encoder.geometry().features();
        let padded = encoded.pad.rows.broadcast_as((pads, features)).and_then(|p| Tensor::cat(&[&p, &embedding.rows], 0));
        embeds.push(padded.map_err(failed("padding an embedding"))?);
    }
    let embeds = Tensor::stack(&embeds, 0).map_err(failed("joining embeddings"))?;
    write(out, &[("attention_mask", Output::integers(&mask)), ("embeds", Output::floats(&embeds)?), ("input_ids", Output::integers(&ids))])
}

/// The case of [`ids`].
#[derive(Deserialize)]
struct IdsCase {
    captions: Vec<Vec<u32>>,
    pad_id: u32,
    max_length: usize,
    hidden_state_indices: [usize; 3],
}

/// Hidden states of captions that are given as token ids in the JSON `case`, of the text encoder in the folder `encoder`: `rows` `[tokens, 3 * hidden]` of
/// all captions, and `pad` `[1, 3 * hidden]`, F32.
///
/// # Errors
/// [`Error::Data`] for a malformed case; what loading and encoding report.
pub fn ids(place: TextPlace, encoder: &Path, case: &Path, out: &Path) -> Result<()> {
    let json = std::fs::read_to_string(case).map_err(|e| Error::io("cannot read the case", case, e))?;
    let wrong = || Error::data("the case is malformed").at(case).expected("captions, pad_id, max_length, three hidden_state_indices");
    let c: IdsCase = serde_json::from_str(&json).map_err(|e| wrong().cause(e))?;
    if c.captions.iter().any(|ids| ids.is_empty() || ids.len() > c.max_length) {
        return Err(wrong().cause("a caption has no tokens, or more than max_length"));
    }
    let encoder = AnyTextEncoder::open(encoder, place.device, Some(place.ty), None, None)?;
    let captions: Vec<Tokens> = c.captions.into_iter().map(|ids| Tokens { ids, cut: 0 }).collect();
    let encoded = encoder.encode(&captions, c.pad_id, c.hidden_state_indices, c.max_length, DType::F32, &mut |_, _| Ok(()))?;
    let rows: Vec<&Tensor> = encoded.captions.iter().map(|e| &e.rows).collect();
    let rows = Tensor::cat(&rows, 0).map_err(failed("joining embeddings"))?;
    write(out, &[("pad", Output::floats(&encoded.pad.rows)?), ("rows", Output::floats(&rows)?)])
}

/// The VAE on `image_u8_nchw` of the safetensors `case`: `pixels`, `latent_mode`, `tokens` and `decoded` (from the mode), all F32.
///
/// # Errors
/// [`Error::Data`] for a malformed case; what loading and encoding report.
pub fn vae(model: &Path, case: &Path, out: &Path) -> Result<()> {
    vae_on(Place::on(DeviceKind::Cpu), model, case, out)
}

/// [`vae`] on any device, whole or in strips.
///
/// # Errors
/// As [`vae`]; [`Error::Absent`] without the device.
pub fn vae_on(place: Place, model: &Path, case: &Path, out: &Path) -> Result<()> {
    let input = Checkpoint::open(case)?;
    let image = input.tensor("image_u8_nchw")?;
    let shape = match (image.dtype, image.shape.as_slice()) {
        (Dtype::U8, &[b, 3, h, w]) if b > 0 => (b, 3, h, w),
        (dtype, shape) => {
            return Err(Error::data("image_u8_nchw is no batch of images")
                .at(case)
                .expected("U8 [B, 3, H, W]")
                .found(format!("{dtype:?} {shape:?}")));
        }
    };
    // A folder with nothing but a VAE is enough here.
    let inner = model.join("vae");
    let found = if inner.is_dir() { Some(inner) } else { model_path::resolve_path(&model.to_string_lossy())?.vae };
    let vae = Vae::open(part(found.as_deref(), "VAE", model)?, Half::Both, place)?;
    let pixels = Tensor::from_slice(image.bytes(), shape, &Device::Cpu).and_then(|t| normalise(&t)).map_err(failed("reading images"))?;
    let mode = vae.latent_mode(&pixels)?;
    let (tokens, decoded) = (vae.tokens(&mode)?, vae.decode(&mode)?);
    let named = [("decoded", &decoded), ("latent_mode", &mode), ("pixels", &pixels), ("tokens", &tokens)];
    let outputs = named.into_iter().map(|(name, t)| Ok((name, Output::floats(t)?))).collect::<Result<Vec<_>>>()?;
    write(out, &outputs)
}
