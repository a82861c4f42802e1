//! One full-size block of each kind, for comparison with PyTorch: inputs, weights, adapters and gradients go to files, and
//! `scripts/check_block_torch.py` computes the gradients again in float32 by autograd.
//!
//! A model of one block is taken through a step; what the block saw (its input, its conditioning) is read off in between, and the gradient of
//! its output replaced by random values, for text rows too, so that the comparison is of the whole block and of nothing else. Once in float32
//! and once in bf16. The same files can be written by the CPU path, which checks the script.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use serenity_cuda::{Gpu, Mat, Ty};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::{Error, Result, atomic_file};

use super::model::{Hosted, OPTIMIZER, SMALL_BUDGET, Setup, build, everything, pinned, random_batch, random_payload, sizes};
use super::timing::dev;
use super::{Line, Options, holds};
use crate::cuda::blocks::{Form, Payload};
use crate::cuda::flight::Flight;
use crate::cuda::plan::Limits;
use crate::cuda::step::read;
use crate::lora_file::safetensors_bytes;
use crate::model::ops::rope::Rope;
use crate::model::{AdapterGrads, AdapterSet, BlockWeights, Conditioning, OtherWeights, Positions, Streams, tensor_error};
use crate::model::{block::BlockView, double_block::DoubleBlock, single_block::SingleBlock};
use crate::rng;
use serenity_protocol::slab::quant;

/// Text tokens, and rows and columns of the image's grid.
const SIZES: (usize, usize, usize) = (128, 16, 16);
/// Of the adapters, which all linears have.
const RANK: usize = 16;
/// Text features: what embeds them is not compared.
const FEATURES: usize = 256;

/// Modulations by the names that the script knows.
const SETS: [&str; 5] = ["image.attention", "image.mlp", "text.attention", "text.mlp", "single"];

/// Tensors by the names that the script knows.
type Tensors = Vec<(String, Tensor)>;

pub(super) fn block(options: &Options, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let g = options.geometry.as_deref().map_or_else(|| Ok(dev()), TransformerGeometry::from_config_file)?;
    std::fs::create_dir_all(&options.dump)
        .map_err(|e| Error::config("the folder for the blocks cannot be made").at(&options.dump).cause(e))?;
    for (name, double) in [("double", 1), ("single", 0)] {
        let geometry =
            TransformerGeometry { num_layers: double, num_single_layers: 1 - double, joint_attention_dim: FEATURES, ..g.clone() };
        let one = One::new(geometry)?;
        let types: &[Ty] = if options.on_processor { &[Ty::F32] } else { &[Ty::F32, Ty::Bf16] };
        for ty in types {
            let tensors = if options.on_processor { one.on_processor()? } else { one.on_device(options.device, *ty)? };
            one.write(&options.dump, (name, *ty), &tensors)?;
            let folder = options.dump.display();
            emit(holds(
                format!("{name} block, {}, in files", ty.name()),
                true,
                format!("now: python3 scripts/check_block_torch.py {folder}"),
            ));
        }
    }
    Ok(())
}

/// A model of one block.
struct One {
    geometry: TransformerGeometry,
    other: OtherWeights,
    payload: Payload,
    bytes: Vec<u8>,
    adapters: AdapterSet,
}

impl One {
    fn new(geometry: TransformerGeometry) -> Result<Self> {
        let other = OtherWeights::load(&geometry, &Device::Cpu, DType::F32, true, |name, shape| {
            let count = shape.iter().product();
            Ok(match shape {
                [_, columns] => {
                    let bound = (3.0 / *columns as f64).sqrt();
                    rng::uniforms(&mut rng::stream(1, name, 0, 0), count, -bound, bound)
                }
                _ => rng::uniforms(&mut rng::stream(1, name, 0, 0), count, 0.7, 1.3),
            })
        })?;
        let (payload, bytes) = random_payload(&geometry, BlockId(0), 0);
        let mut adapters = everything(&geometry, RANK)?;
        for adapter in &mut adapters.adapters {
            // The device multiplies by their bf16 copies.
            (adapter.a, adapter.b) = (rounded(&adapter.a)?, rounded(&adapter.b)?);
        }
        Ok(Self { geometry, other, payload, bytes, adapters })
    }

    fn on_device(&self, device: usize, ty: Ty) -> Result<Tensors> {
        let (g, gpu) = (&self.geometry, Gpu::open(device)?);
        let (text, height, width) = SIZES;
        let batch = random_batch(g, 3, (1, text, height, width))?;
        let memory = vec![pinned(&gpu, &self.bytes)?];
        let hosted = Hosted { geometry: g.clone(), other: self.other.clone(), payloads: vec![self.payload.clone()], memory };
        let setup = Setup {
            hosted: &hosted,
            ty,
            adapters: &self.adapters,
            optimizer: &OPTIMIZER,
            batches: vec![sizes(&batch)?],
            budget: 8 * SMALL_BUDGET,
            // As most blocks are in training: recomputed.
            limits: Limits { kept_max: 0, ..Limits::default() },
        };
        let mut step = build(gpu, setup)?;
        let mut tensors = Tensors::new();
        step.gradients_watched(std::slice::from_ref(&batch), &mut |gpu, flight| {
            gpu.fill_random(flight.space.gradient, 5, 1.0)?;
            tensors = seen(gpu, flight)?;
            Ok(())
        })?;
        tensors.extend(self.gradients(&step.read_gradients()?));
        Ok(tensors)
    }

    /// The same by the CPU path, from random states instead of embedded ones.
    fn on_processor(&self) -> Result<Tensors> {
        let g = &self.geometry;
        let weights = BlockWeights::from_f32(g, BlockId(0), self.dequantised()?, &Device::Cpu, DType::F32)?;
        let (text, height, width) = SIZES;
        let tokens = text + height * width;
        let random = |what: &str| -> Result<Tensor> {
            let values = rng::normals(&mut rng::stream(4, what, 0, 0), tokens * g.inner_dim());
            rounded(&Tensor::from_vec(values, (1, tokens, g.inner_dim()), &Device::Cpu).map_err(held)?)
        };
        let (x, dy) = (random("x")?, random("dy")?);
        let rope = Rope::new(&Rope::positions(text, height, width), &g.axes_dims_rope, g.rope_theta, &Device::Cpu).map_err(held)?;
        let positions = Arc::new(Positions::new(rope, text).map_err(held)?);
        let guidance = g.guidance_embeds.then_some([3.5].as_slice());
        let cond = Conditioning::new(g, &self.other, &[0.4], guidance, positions)?;
        let view = BlockView { geometry: g, block: BlockId(0), weights: &weights, other: &self.other, adapters: &self.adapters };
        let mut grads = AdapterGrads::zeros(&self.adapters)?;
        if g.num_layers > 0 {
            let streams = |t: &Tensor| -> candle_core::Result<Streams> {
                Ok(Streams { text: t.narrow(1, 0, text)?.contiguous()?, image: t.narrow(1, text, tokens - text)?.contiguous()? })
            };
            let (x, dy) = (streams(&x).map_err(held)?, streams(&dy).map_err(held)?);
            DoubleBlock::new(&view)?.backward(&x, &cond, &dy, false, &mut grads).map_err(held)?;
        } else {
            SingleBlock::new(&view)?.backward(&x, &cond, &dy, false, &mut grads).map_err(held)?;
        }
        let mut tensors = vec![("x".into(), x), ("dy".into(), dy)];
        let rope = &cond.positions.joint;
        tensors.extend([("cos".into(), rope.cos().clone()), ("sin".into(), rope.sin().clone())]);
        let sets = [&cond.image.attention, &cond.image.mlp, &cond.text.attention, &cond.text.mlp, &cond.single];
        for (name, set) in SETS.into_iter().zip(sets) {
            for (part, tensor) in [("shift", &set.shift), ("scale", &set.scale), ("gate", &set.gate)] {
                tensors.push((format!("{name}.{part}"), tensor.clone()));
            }
        }
        tensors.extend(self.gradients(&grads));
        Ok(tensors)
    }

    fn dequantised(&self) -> Result<Vec<Vec<f32>>> {
        let missing = || Error::invariant("a part of a random block is not there");
        let matrix = |part: &crate::cuda::blocks::Part| -> Result<Vec<f32>> {
            let Form::Int8 { codes, scales, padded } = part.form else { return Err(missing()) };
            let mut row = vec![half::bf16::ZERO; part.cols];
            let mut all = Vec::with_capacity(part.rows * part.cols);
            for index in 0..part.rows {
                let codes = self.bytes.get(codes + index * padded..codes + index * padded + part.cols).ok_or_else(missing)?;
                let scale = self.bytes.get(scales + 4 * index..scales + 4 * index + 4).ok_or_else(missing)?;
                quant::dequantize(bytemuck::cast_slice(codes), bytemuck::pod_read_unaligned(scale), &mut row);
                all.extend(row.iter().map(|v| v.to_f32()));
            }
            Ok(all)
        };
        self.payload.parts.iter().map(matrix).collect()
    }

    fn gradients(&self, grads: &AdapterGrads) -> Tensors {
        let named = self.adapters.adapters.iter().zip(grads.a.iter().zip(&grads.b));
        named.flat_map(|(x, (a, b))| [(format!("grad.A.{}", x.name), a.clone()), (format!("grad.B.{}", x.name), b.clone())]).collect()
    }

    fn write(&self, folder: &Path, (kind, ty): (&str, Ty), tensors: &Tensors) -> Result<()> {
        let g = &self.geometry;
        let mut all: Tensors = tensors.clone();
        for adapter in &self.adapters.adapters {
            all.extend([(format!("A.{}", adapter.name), adapter.a.clone()), (format!("B.{}", adapter.name), adapter.b.clone())]);
        }
        for norm in g.block_norms(BlockId(0)) {
            all.push((format!("norm.{norm}"), self.other.norm(g, BlockId(0), norm)?.clone()));
        }
        let prefix = format!("{}.", g.block_prefix(BlockId(0)));
        let linears = g.block_linears(BlockId(0));
        let part = |(part, linear): (&crate::cuda::blocks::Part, &serenity_protocol::geometry::LinearSpec)| {
            let (codes, scales, padded) = match part.form {
                Form::Int8 { codes, scales, padded } => (codes, scales, padded),
                Form::Dense(..) => (0, 0, 0),
            };
            json!({"name": linear.name.strip_prefix(&prefix), "rows": part.rows, "cols": part.cols,
                "codes": codes, "scales": scales, "padded": padded})
        };
        let about = json!({
            "kind": kind, "type": ty.name(), "prefix": prefix, "heads": g.num_attention_heads, "mlp": g.mlp_dim(), "eps": g.eps, "text": SIZES.0,
            "scale": self.adapters.alpha / self.adapters.rank as f64,
            "parts": self.payload.parts.iter().zip(&linears).map(part).collect::<Vec<_>>(),
        });
        let name = format!("{kind}-{}", ty.name());
        atomic_file::write(&folder.join(format!("{name}.payload")), &self.bytes)?;
        atomic_file::write(&folder.join(format!("{name}.safetensors")), &safetensors_bytes(&BTreeMap::new(), &all)?)?;
        atomic_file::write(&folder.join(format!("{name}.json")), about.to_string().as_bytes())
    }
}

/// What a block sees of a micro-batch, before its backward pass.
fn seen(gpu: &Gpu, flight: &Flight) -> Result<Tensors> {
    let (space, cond) = (&flight.space, &flight.space.conditioning);
    let tensor = |mat: Mat| Tensor::from_vec(read(gpu, mat)?, (mat.rows, mat.cols), &Device::Cpu).map_err(held);
    let mut tensors = vec![("x".into(), tensor(space.states.get(0)?)?), ("dy".into(), tensor(space.gradient)?)];
    tensors.extend([("cos".into(), tensor(cond.cos)?), ("sin".into(), tensor(cond.sin)?)]);
    let sets = [&cond.image.attention, &cond.image.mlp, &cond.text.attention, &cond.text.mlp, &cond.single];
    for (name, set) in SETS.into_iter().zip(sets) {
        for (part, mat) in [("shift", set.shift), ("scale", set.scale), ("gate", set.gate)] {
            tensors.push((format!("{name}.{part}"), tensor(mat)?));
        }
    }
    Ok(tensors)
}

fn held(e: candle_core::Error) -> Error {
    tensor_error("a tensor of a block cannot be computed", e)
}

/// Through bf16.
fn rounded(t: &Tensor) -> Result<Tensor> {
    t.to_dtype(DType::BF16).and_then(|t| t.to_dtype(DType::F32)).map_err(held)
}
