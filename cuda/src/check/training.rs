//! Loss with its gradient; AdamW with clipping, equal to the host's float32 arithmetic bit for bit.

use serenity_protocol::Result;
use serenity_protocol::config::OptimizerConfig;

use super::{Check, Expected, Work, limit};
use crate::driver::Ptr;
use crate::mat::{Mat, Ty};
use crate::ops::loss::MSE_PARTIALS;
use crate::ops::optimizer::{AdamW, Trained};

/// `mse`: the loss in float64 and the gradient.
pub fn loss(check: &mut Check<'_>) -> Result<()> {
    for (rows, cols, stride) in [(1, 1, 1), (3, 100, 104), (1024, 128, 128), (4096, 128, 128)] {
        for (ty, from) in [(Ty::Bf16, Ty::Bf16), (Ty::Bf16, Ty::F32), (Ty::F32, Ty::F32)] {
            let mark = check.arena.mark();
            let (prediction, ps) = check.mat(from, rows, cols, stride, &Check::random(1, rows * cols))?;
            let (target, ts) = check.mat(Ty::F32, rows, cols, stride, &Check::random(2, rows * cols))?;
            let gradient = check.poisoned(ty, rows, cols, stride)?;
            let (loss, scratch) = (check.arena.reserve(8)?, check.arena.reserve(8 * MSE_PARTIALS)?);
            let count = (rows * cols) as f64;
            let values = ps.iter().zip(&ts).map(|(p, t)| 2.0 * 0.25 / count * (p - t)).collect();
            let expected: f64 = ps.iter().zip(&ts).map(|(p, t)| (p - t) * (p - t)).sum::<f64>() / count;
            let name = format!("{} of {} {rows} x {cols} ({stride})", ty.name(), from.name());
            check.case(name.as_str(), limit(ty), &[Expected { mat: gradient, values }], Work::None, &|gpu| {
                gpu.mse(loss, Some(gradient), prediction, target, 0.25, scratch)
            })?;
            let mut bytes = [0u8; 8];
            check.gpu.download(&mut bytes, loss)?;
            let with = f64::from_le_bytes(bytes);
            check.gpu.mse(loss, None, prediction, target, 1.0, scratch)?;
            check.gpu.download(&mut bytes, loss)?;
            // The differences are float32, everything after is float64.
            let near = (with - expected).abs() <= 1e-6 * expected.abs();
            check.holds(format!("value {name}: {with:.9} for {expected:.9}"), near && f64::from_le_bytes(bytes) == with);
            check.arena.reset(mark)?;
        }
    }
    Ok(())
}

/// The host's copy of one trained tensor.
struct Host {
    parameter: Vec<f32>,
    gradient: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
}

const CONFIG: OptimizerConfig =
    OptimizerConfig { learning_rate: 1e-3, weight_decay: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0 };

/// `AdamW`: three updates of tensors of awkward sizes, with the clip active and not, and a norm that is not finite.
pub fn optimizer(check: &mut Check<'_>) -> Result<()> {
    let lengths = [1usize, 4095, 4096, 4097, 98_304, 884_736];
    for limit in [1.0, 0.0, 1e9] {
        let mark = check.arena.mark();
        updates(check, &lengths, OptimizerConfig { max_grad_norm: limit, ..CONFIG })?;
        check.arena.reset(mark)?;
    }
    Ok(())
}

fn updates(check: &mut Check<'_>, lengths: &[usize], config: OptimizerConfig) -> Result<()> {
    let mut hosts = Vec::new();
    let mut tensors = Vec::new();
    for (i, len) in lengths.iter().enumerate() {
        let seed = i as u64 * 10;
        let host = Host {
            parameter: Check::random(seed, *len),
            gradient: Check::random(seed + 1, *len),
            first: vec![0.0; *len],
            second: vec![0.0; *len],
        };
        let up = |values: &[f32]| check.mat(Ty::F32, 1, *len, *len, values).map(|(m, _)| m.ptr);
        let copy = if i % 2 == 0 { check.poisoned(Ty::Bf16, 1, *len, *len)?.ptr } else { Ptr::NULL };
        let (parameter, gradient, first, second) = (up(&host.parameter)?, up(&host.gradient)?, up(&host.first)?, up(&host.second)?);
        tensors.push(Trained { parameter, gradient, first, second, copy, len: *len });
        hosts.push(host);
    }
    let adam = AdamW::new(check.gpu, check.arena, &config, &tensors)?;
    let name = format!("max norm {}", config.max_grad_norm);
    for update in 1..=3u64 {
        let lr = 1e-3 / update as f64;
        adam.norm(check.gpu)?;
        adam.step(check.gpu, update, lr)?;
        let norm = adam.read_norm(check.gpu)?;
        let square: f64 = hosts.iter().flat_map(|h| &h.gradient).map(|g| f64::from(*g) * f64::from(*g)).sum();
        check.holds(format!("{name}, update {update}: norm {norm:.9}"), (norm - square.sqrt()).abs() <= 1e-12 * norm);
        let factor = config.max_grad_norm / (norm + 1e-6);
        let clip = if config.max_grad_norm > 0.0 && factor < 1.0 { factor as f32 } else { 1.0 };
        hosts.iter_mut().for_each(|h| host_update(h, &config, clip, update, lr));
        check.holds(format!("{name}, update {update}: bit for bit the host's"), same(check, &tensors, &hosts)?);
        // New gradients.
        for (i, (tensor, host)) in tensors.iter().zip(&mut hosts).enumerate() {
            host.gradient = Check::random(update * 1000 + i as u64, tensor.len);
            check.gpu.upload(tensor.gradient, bytemuck::cast_slice(&host.gradient))?;
        }
    }
    let micros = check.median_micros(&|_| Ok(()), &|gpu| adam.norm(gpu).and_then(|()| adam.step(gpu, 1000, 0.0)))?;
    let bytes = lengths.iter().sum::<usize>() * 32;
    check.push(super::Row {
        micros: Some(micros),
        rate: Work::Bytes(bytes as f64).rate(micros),
        ..check.row(format!("{name}: norm + update"))
    });
    not_finite(check, &adam, &tensors)
}

fn host_update(h: &mut Host, c: &OptimizerConfig, clip: f32, update: u64, lr: f64) {
    let bias = |beta: f64| 1.0 - libm::pow(beta, update as f64);
    let (keep, step, root) = ((1.0 - lr * c.weight_decay) as f32, (lr / bias(c.beta1)) as f32, libm::sqrt(bias(c.beta2)) as f32);
    let (b1, ob1, b2, ob2, eps) = (c.beta1 as f32, (1.0 - c.beta1) as f32, c.beta2 as f32, (1.0 - c.beta2) as f32, c.eps as f32);
    let state = h.first.iter_mut().zip(&mut h.second);
    for ((p, g), (m, v)) in h.parameter.iter_mut().zip(&h.gradient).zip(state) {
        let g = if clip == 1.0 { *g } else { g * clip };
        *m = b1 * *m + ob1 * g;
        *v = b2 * *v + ob2 * g * g;
        *p = *p * keep - step * *m / (v.sqrt() / root + eps);
    }
}

fn same(check: &Check<'_>, tensors: &[Trained], hosts: &[Host]) -> Result<bool> {
    let mut all = true;
    for (tensor, host) in tensors.iter().zip(hosts) {
        let read = |ptr: Ptr, ty: Ty| check.read(Mat::new(ptr, ty, 1, tensor.len));
        for (ptr, values) in [(tensor.parameter, &host.parameter), (tensor.first, &host.first), (tensor.second, &host.second)] {
            all &= read(ptr, Ty::F32)?.iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits());
        }
        if tensor.copy != Ptr::NULL {
            all &= read(tensor.copy, Ty::Bf16)?.iter().zip(&host.parameter).all(|(a, b)| *a == half::bf16::from_f32(*b).to_f32());
        }
    }
    Ok(all)
}

/// A gradient that is not finite stops the update.
fn not_finite(check: &mut Check<'_>, adam: &AdamW, tensors: &[Trained]) -> Result<()> {
    let Some(last) = tensors.last() else { return Ok(()) };
    check.gpu.upload(last.gradient, &f32::INFINITY.to_le_bytes())?;
    let before = check.read(Mat::new(last.parameter, Ty::F32, 1, last.len))?;
    adam.norm(check.gpu)?;
    adam.step(check.gpu, 4, 1e-3)?;
    let norm = adam.read_norm(check.gpu)?;
    let after = check.read(Mat::new(last.parameter, Ty::F32, 1, last.len))?;
    check.holds("a norm that is not finite changes nothing", !norm.is_finite() && before == after);
    Ok(())
}
