//! What a micro-batch conditions every block with: time and guidance embedding, modulation, positions.
//!
//! All of it comes from frozen weights and the batch, is computed once per step and micro-batch, and gets no gradient. Formulas: diffusers'
//! `transformer_flux2.py` (`Flux2TimestepGuidanceEmbeddings`, `Flux2Modulation`).

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use serenity_protocol::geometry::TransformerGeometry;

use super::OtherWeights;
use super::ops::gemm;
use super::ops::rope::Rope;

/// One modulation set, `[B, 1, D]` float32 each.
#[derive(Debug)]
pub struct Modulation {
    /// Added after the norm.
    pub shift: Tensor,
    /// Multiplies the norm's result as `1 + scale`.
    pub scale: Tensor,
    /// Multiplies what is added to the residual stream.
    pub gate: Tensor,
}

/// Modulation of one stream of the double blocks.
#[derive(Debug)]
pub struct StreamModulation {
    /// Around attention.
    pub attention: Modulation,
    /// Around the feed-forward part.
    pub mlp: Modulation,
}

/// The rotary tables of one (text length, latent grid), shared by every batch of that shape.
#[derive(Debug)]
pub struct Positions {
    /// Text tokens then image tokens.
    pub joint: Rope,
    /// The text part of `joint`.
    pub text: Rope,
    /// The image part of `joint`.
    pub image: Rope,
    /// Text tokens.
    pub text_tokens: usize,
}

impl Positions {
    /// Splits a table after its first `text_tokens` rows.
    pub fn new(joint: Rope, text_tokens: usize) -> Result<Self> {
        let image_tokens = joint.tokens()?.saturating_sub(text_tokens);
        Ok(Self { text: joint.rows(0, text_tokens)?, image: joint.rows(text_tokens, image_tokens)?, text_tokens, joint })
    }
}

/// Everything a block needs besides weights and hidden states.
#[derive(Debug)]
pub struct Conditioning {
    /// Embedding of time (and guidance), `[B, D]` in the compute dtype.
    pub temb: Tensor,
    /// Image stream of the double blocks.
    pub image: StreamModulation,
    /// Text stream of the double blocks.
    pub text: StreamModulation,
    /// Single blocks.
    pub single: Modulation,
    /// Of the final norm, `[B, 1, D]` float32.
    pub out_scale: Tensor,
    /// Of the final norm, `[B, 1, D]` float32.
    pub out_shift: Tensor,
    /// Rotary tables.
    pub positions: Arc<Positions>,
}

impl Conditioning {
    /// From the noise level of each sample in [0, 1] and the raw guidance of each sample. Guidance is ignored by a model without
    /// guidance embedding, and its term is left out where none is given.
    pub fn new(
        geometry: &TransformerGeometry,
        other: &OtherWeights,
        timestep: &[f32],
        guidance: Option<&[f32]>,
        positions: Arc<Positions>,
    ) -> serenity_protocol::Result<Self> {
        let embed = |name: &str, values: &[f32]| -> serenity_protocol::Result<Tensor> {
            let (first, second) = (
                other.linear(&format!("time_guidance_embed.{name}.linear_1"))?,
                other.linear(&format!("time_guidance_embed.{name}.linear_2"))?,
            );
            sinusoid(values, geometry.timestep_guidance_channels, other.device())
                .and_then(|s| gemm::nt(&gemm::nt(&s.to_dtype(other.dtype())?, first)?.silu()?, second))
                .map_err(|e| super::tensor_error("cannot embed the time", e))
        };
        let mut temb = embed("timestep_embedder", timestep)?;
        if let (true, Some(guidance)) = (geometry.guidance_embeds, guidance) {
            temb = (temb + embed("guidance_embedder", guidance)?).map_err(|e| super::tensor_error("cannot add the guidance", e))?;
        }
        let weights = ["double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation", "norm_out"]
            .into_iter()
            .map(|name| other.linear(&format!("{name}.linear")))
            .collect::<serenity_protocol::Result<Vec<_>>>()?;
        let made = (|| -> Result<Option<Self>> {
            let [image, text, single, out] = weights.as_slice() else { return Ok(None) };
            let active = temb.silu()?;
            let chunks = |weight: &Tensor, count: usize| gemm::nt(&active, weight)?.to_dtype(DType::F32)?.unsqueeze(1)?.chunk(count, 2);
            let (Some(image), Some(text)) = (stream(&chunks(image, 6)?)?, stream(&chunks(text, 6)?)?) else { return Ok(None) };
            let Some(single) = modulation(&chunks(single, 3)?)? else { return Ok(None) };
            // diffusers' order; the single-file naming has the halves the other way round and is swapped when it is read.
            let out = chunks(out, 2)?;
            let [out_scale, out_shift] = out.as_slice() else { return Ok(None) };
            let (out_scale, out_shift) = (out_scale.contiguous()?, out_shift.contiguous()?);
            Ok(Some(Self { temb: temb.clone(), image, text, single, out_scale, out_shift, positions }))
        })();
        made.map_err(|e| super::tensor_error("cannot compute the modulation", e))?
            .ok_or_else(|| serenity_protocol::Error::invariant("a modulation has a wrong number of parts"))
    }
}

fn modulation(parts: &[Tensor]) -> Result<Option<Modulation>> {
    let [shift, scale, gate] = parts else { return Ok(None) };
    Ok(Some(Modulation { shift: shift.contiguous()?, scale: scale.contiguous()?, gate: gate.contiguous()? }))
}

fn stream(parts: &[Tensor]) -> Result<Option<StreamModulation>> {
    let (Some(first), Some(last)) = (parts.get(..3), parts.get(3..)) else { return Ok(None) };
    let (Some(attention), Some(mlp)) = (modulation(first)?, modulation(last)?) else { return Ok(None) };
    Ok(Some(StreamModulation { attention, mlp }))
}

/// `[B, channels]` float32: cosines, then sines, of `1000 value * 10000^(-j / half)`. Time stays float32 whatever the compute dtype: bf16
/// would round it to one of 256 levels.
pub fn sinusoid(values: &[f32], channels: usize, device: &Device) -> Result<Tensor> {
    let half = channels / 2;
    let frequencies: Vec<f32> = (0..half).map(|j| exp_as_reference(-LN_10000 * j as f32 / half as f32)).collect();
    let mut data = Vec::with_capacity(values.len() * channels);
    for value in values {
        let time = value * 1000.0;
        data.extend(frequencies.iter().map(|w| (time * w).cos()));
        data.extend(frequencies.iter().map(|w| (time * w).sin()));
        // An odd number of channels ends in a zero.
        data.resize(data.len() + channels % 2, 0.0);
    }
    Tensor::from_vec(data, (values.len(), channels), device)
}

/// ln 10000, the base of the frequencies, in float32 as the reference has it.
const LN_10000: f32 = 9.210_340_5;

/// e^x of a float32 in about -10..0, with the reference's last bit.
///
/// A frequency near 1 is multiplied by a time of up to 1000, so that one unit in its last place turns by up to 6e-5 rad: as much as the whole
/// tolerance of a comparison in float32. The reference's vector math library takes 2^(n/128) from a table in two parts and a quadratic in
/// the remainder, which rounds 1 % of the frequencies otherwise than exactly; this does the same, and needs no platform's `exp`.
fn exp_as_reference(x: f32) -> f32 {
    const PARTS: f64 = 128.0;
    const STEP: f64 = std::f64::consts::LN_2 / PARTS;
    let n = (x * (PARTS * std::f64::consts::LOG2_E) as f32).round_ties_even();
    let remainder = (-n).mul_add((STEP - f64::from(STEP as f32)) as f32, (-n).mul_add(STEP as f32, x));
    let octave = (f64::from(n) / PARTS).floor();
    let fraction = libm::exp2(f64::from(n) / PARTS - octave);
    let high = fraction as f32;
    let low = (fraction - f64::from(high)) as f32;
    let poly = (remainder * remainder).mul_add(0.5, remainder);
    (high + high.mul_add(poly, low)) * libm::exp2(octave) as f32
}
