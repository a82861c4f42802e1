//! The device against the CPU path on the same dequantised weights.
#![forbid(unsafe_code)]

use candle_core::{DType, Device, Tensor};
use serenity_cuda::{Gpu, Ty};
use serenity_protocol::Result;

use super::model::{Hosted, Kind, OPTIMIZER, SMALL_BUDGET, Setup, build, everything, open_model, sizes, test_batches, through_int8};
use super::{Line, Options, compared, errors, holds, rounded};
use crate::cuda::plan::Limits;
use crate::cuda::step::Sample;
use crate::model::{CheckpointSource, Flux2, OtherWeights, tensor_error};
use crate::optimizer::host;

pub(super) fn processor(options: &Options, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let model = open_model(&options.goldens)?;
    let g = model.geometry();
    let (adapters, batches) = (everything(g, 8)?, test_batches(g)?);
    let read = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
        let values = model.tensor_f32(name, shape)?;
        let block = name.starts_with("transformer_blocks.") || name.starts_with("single_transformer_blocks.");
        Ok(match shape {
            [_, cols] if block => through_int8(&values, *cols),
            _ => values,
        })
    };
    let reference = Flux2::new(g.clone(), OtherWeights::load(g, &Device::Cpu, DType::F32, true, read)?);
    let mut source = CheckpointSource::new(g.clone(), Device::Cpu, DType::F32, Box::new(read));
    let expected = reference.loss_and_grads(&mut source, &adapters, &batches, &|| false)?;
    let optimizer = OPTIMIZER;
    for (ty, limit) in [(Ty::F32, 1e-4), (Ty::Bf16, 5e-2)] {
        let gpu = Gpu::open(options.device)?;
        let hosted = Hosted::of(&gpu, &model, Kind::Int8)?;
        let setup = Setup {
            hosted: &hosted,
            ty,
            adapters: &adapters,
            optimizer: &optimizer,
            batches: batches.iter().map(sizes).collect::<Result<_>>()?,
            budget: SMALL_BUDGET,
            limits: Limits { buffers: (2, 2), resident_max: 1, ..Limits::default() },
        };
        let mut step = build(gpu, setup)?;
        let losses = step.gradients(&batches, &|| false)?;
        for (i, (ours, theirs)) in losses.iter().zip(&expected.losses).enumerate() {
            emit(compared(format!("{} loss of micro-batch {i}", ty.name()), (ours - theirs).abs() / theirs, limit / 5.0));
        }
        let grads = step.read_gradients()?;
        let forward_only = step.loss(&batches)?;
        emit(holds(format!("{} losses of a forward pass alone are the same", ty.name()), forward_only == losses, String::new()));
        for (part, ours, theirs) in [("A", &grads.a, &expected.grads.a), ("B", &grads.b, &expected.grads.b)] {
            let (mut error, mut cosine, mut name) = (0.0f64, 1.0f64, String::new());
            for ((adapter, x), y) in adapters.adapters.iter().zip(ours).zip(theirs) {
                let values = |t: &Tensor| host(t).map_err(|e| tensor_error("a gradient cannot be read", e));
                let (x, y) = (values(x)?, values(y)?);
                let (_, norm) = errors(&x, &y);
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                let c = dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt();
                if norm.is_nan() || norm > error {
                    (error, name) = (norm, adapter.name.clone());
                }
                cosine = cosine.min(c);
            }
            let line = compared(format!("{} gradients of {part}: worst relative norm", ty.name()), error, limit);
            emit(Line { note: format!("{name}, least cosine {cosine:.7}"), ..line });
        }
        // The same values everywhere: predictions against float32 ones.
        for (i, (batch, theirs)) in batches.iter().zip(&expected.predictions).enumerate() {
            let (_, output) = step.forward(&Sample::of(batch)?, &mut |_, _, _| Ok(()))?;
            let theirs = host(theirs).map_err(|e| tensor_error("a prediction cannot be read", e))?;
            let (largest, norm) = errors(&output, &theirs);
            let (max_limit, norm_limit) = if ty == Ty::F32 { (1e-5, 1e-5) } else { (rounded::LARGEST, rounded::ADAPTED_NORM) };
            emit(compared(format!("{} prediction {i}: largest difference", ty.name()), largest, max_limit));
            emit(compared(format!("{} prediction {i}: norm", ty.name()), norm, norm_limit));
        }
    }
    Ok(())
}
