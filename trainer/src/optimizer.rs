//! AdamW on the float32 adapters, and clipping by the global gradient norm, as PyTorch computes both.
//!
//! Adapters and moments are float32 whatever the model computes in: an update of 1e-4 of a value would vanish in bf16. The update is
//! element by element, so that threads cannot change it; the norm is summed in float64 in one fixed order.
//!
//! Order of an update, from `torch.optim.AdamW`: decay `p -= lr * wd * p`, then the moments, then
//! `p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
#![forbid(unsafe_code)]

use candle_core::Tensor;
use rayon::prelude::*;
use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::{Error, Result};

use crate::model::{AdapterGrads, AdapterSet};

/// First and second moment of one parameter tensor, in its element order.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Vec<f32>,
    /// Running mean of its square.
    pub second: Vec<f32>,
}

/// The optimiser's state: how many updates were made, and the moments of every adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    config: OptimizerConfig,
    updates: u64,
    /// A then B of each adapter, in the adapters' order.
    moments: Vec<(Moments, Moments)>,
}

impl AdamW {
    /// Zero moments for `adapters`.
    #[must_use]
    pub fn new(config: &OptimizerConfig, adapters: &AdapterSet) -> Self {
        let zero = |t: &Tensor| Moments { first: vec![0.0; t.elem_count()], second: vec![0.0; t.elem_count()] };
        Self { config: *config, updates: 0, moments: adapters.adapters.iter().map(|a| (zero(&a.a), zero(&a.b))).collect() }
    }

    /// A state that was saved: `updates` made so far and the moments (A, B) of each adapter.
    ///
    /// # Errors
    /// [`Error::Data`] if the moments do not fit the adapters.
    pub fn restore(config: &OptimizerConfig, adapters: &AdapterSet, updates: u64, moments: Vec<(Moments, Moments)>) -> Result<Self> {
        let fits = |m: &Moments, t: &Tensor| m.first.len() == t.elem_count() && m.second.len() == t.elem_count();
        let all_fit = moments.len() == adapters.adapters.len()
            && adapters.adapters.iter().zip(&moments).all(|(a, (ma, mb))| fits(ma, &a.a) && fits(mb, &a.b));
        if !all_fit {
            return Err(Error::data("the optimiser's saved moments do not fit the adapters"));
        }
        Ok(Self { config: *config, updates, moments })
    }

    /// Updates made so far.
    #[must_use]
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The moments of A and B of each adapter.
    #[must_use]
    pub fn moments(&self) -> &[(Moments, Moments)] {
        &self.moments
    }

    /// One update of `adapters` by `grads` at the learning rate `lr`. After an error from a tensor operation neither state may be used.
    ///
    /// # Errors
    /// [`Error::Invariant`] if gradients and adapters differ in number or shape, or if a tensor operation fails.
    pub fn step(&mut self, adapters: &mut AdapterSet, grads: &AdapterGrads, lr: f64) -> Result<()> {
        let _span = tracing::info_span!("optimiser").entered();
        check_shapes(adapters, grads)?;
        let rule = Rule::new(&self.config, self.updates + 1, lr);
        let updated: Vec<(Tensor, Tensor)> = adapters
            .adapters
            .par_iter()
            .zip(grads.a.par_iter().zip(&grads.b))
            .zip(&mut self.moments)
            .map(|((adapter, (ga, gb)), (ma, mb))| Ok((rule.apply(&adapter.a, ga, ma)?, rule.apply(&adapter.b, gb, mb)?)))
            .collect::<Result<_>>()?;
        for (adapter, (a, b)) in adapters.adapters.iter_mut().zip(updated) {
            (adapter.a, adapter.b) = (a, b);
        }
        self.updates += 1;
        Ok(())
    }
}

fn check_shapes(adapters: &AdapterSet, grads: &AdapterGrads) -> Result<()> {
    let n = adapters.adapters.len();
    let fit = grads.a.len() == n
        && grads.b.len() == n
        && adapters.adapters.iter().zip(&grads.a).all(|(p, g)| p.a.dims() == g.dims())
        && adapters.adapters.iter().zip(&grads.b).all(|(p, g)| p.b.dims() == g.dims());
    if fit { Ok(()) } else { Err(Error::invariant("gradients and adapters differ in number or shape")) }
}

/// The constants of one update, rounded to float32 once.
struct Rule {
    keep: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    root_bias2: f32,
    eps: f32,
}

impl Rule {
    fn new(config: &OptimizerConfig, update: u64, lr: f64) -> Self {
        let bias = |beta: f64| 1.0 - libm::pow(beta, update as f64);
        Self {
            keep: (1.0 - lr * config.weight_decay) as f32,
            beta1: config.beta1 as f32,
            one_minus_beta1: (1.0 - config.beta1) as f32,
            beta2: config.beta2 as f32,
            one_minus_beta2: (1.0 - config.beta2) as f32,
            step_size: (lr / bias(config.beta1)) as f32,
            root_bias2: libm::sqrt(bias(config.beta2)) as f32,
            eps: config.eps as f32,
        }
    }

    fn apply(&self, parameter: &Tensor, grad: &Tensor, moments: &mut Moments) -> Result<Tensor> {
        let failed = |e: candle_core::Error| Error::invariant("the optimiser cannot read or write an adapter").cause(e);
        let mut values = host(parameter).map_err(failed)?;
        let grad = host(grad).map_err(failed)?;
        self.update(&mut values, &grad, moments);
        Tensor::from_vec(values, parameter.shape().clone(), parameter.device()).map_err(failed)
    }

    fn update(&self, values: &mut [f32], grad: &[f32], moments: &mut Moments) {
        let state = moments.first.iter_mut().zip(&mut moments.second);
        for ((p, g), (m, v)) in values.iter_mut().zip(grad).zip(state) {
            *m = self.beta1 * *m + self.one_minus_beta1 * g;
            *v = self.beta2 * *v + self.one_minus_beta2 * g * g;
            *p = *p * self.keep - self.step_size * *m / (v.sqrt() / self.root_bias2 + self.eps);
        }
    }
}

/// The float32 values of `tensor` in row-major order.
///
/// # Errors
/// The tensor library's, e.g. another type.
pub fn host(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1::<f32>()
}

/// Global L2 norm of all gradients before clipping; scales them by `max / (norm + 1e-6)` if that is below one (`max` 0 = never).
///
/// A norm that is not finite leaves the gradients alone: the caller stops the run.
///
/// # Errors
/// [`Error::Invariant`] if a tensor operation fails.
pub fn clip_grad_norm(grads: &mut AdapterGrads, max: f64) -> Result<f64> {
    let failed = |e: candle_core::Error| Error::invariant("the gradients cannot be read").cause(e);
    let mut sum = 0.0f64;
    for (a, b) in grads.a.iter().zip(&grads.b) {
        for tensor in [a, b] {
            // Squares of float32 are exact in float64; the order is that of the adapters and of their elements.
            sum += host(tensor).map_err(failed)?.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
        }
    }
    let norm = libm::sqrt(sum);
    let scale = max / (norm + 1e-6);
    if max > 0.0 && norm.is_finite() && scale < 1.0 {
        for tensor in grads.a.iter_mut().chain(&mut grads.b) {
            // Host values times one float32, so that the result is the same on every device.
            let scaled = host(tensor).map_err(failed)?.iter().map(|g| g * scale as f32).collect();
            *tensor = Tensor::from_vec(scaled, tensor.shape().clone(), tensor.device()).map_err(failed)?;
        }
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::model::Adapter;
    use crate::rng;
    use candle_core::Device;

    const CONFIG: OptimizerConfig =
        OptimizerConfig { learning_rate: 1e-2, weight_decay: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-6, max_grad_norm: 1.0 };

    fn tensor(values: Vec<f32>, rows: usize) -> Tensor {
        let columns = values.len() / rows;
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn random(purpose: &str, index: u64, count: usize) -> Vec<f32> {
        rng::normals(&mut rng::stream(5, purpose, index, 0), count)
    }

    fn adapters() -> AdapterSet {
        let adapter = |i: u64| Adapter { name: format!("linear.{i}"), a: tensor(random("a", i, 12), 2), b: tensor(random("b", i, 10), 5) };
        AdapterSet { rank: 2, alpha: 4.0, adapters: (0..3).map(adapter).collect() }
    }

    fn grads(step: u64) -> AdapterGrads {
        let of = |purpose: &'static str, count: usize, rows: usize| {
            (0..3).map(|i| tensor(random(purpose, 10 * step + i, count), rows)).collect()
        };
        AdapterGrads { a: of("ga", 12, 2), b: of("gb", 10, 5) }
    }

    fn flat(a: &[&Tensor]) -> Vec<f64> {
        a.iter().flat_map(|t| host(t).unwrap()).map(f64::from).collect()
    }

    fn parameters(set: &AdapterSet) -> Vec<f64> {
        flat(&set.adapters.iter().flat_map(|a| [&a.a, &a.b]).collect::<Vec<_>>())
    }

    #[test]
    fn follows_the_textbook_in_float64() {
        let mut set = adapters();
        let mut optimizer = AdamW::new(&CONFIG, &set);
        let mut reference = parameters(&set);
        let (mut m, mut v) = (vec![0.0; reference.len()], vec![0.0; reference.len()]);
        for step in 1..=7u64 {
            let lr = 1e-2 / step as f64;
            let grads = grads(step);
            let g = flat(&grads.a.iter().zip(&grads.b).flat_map(|(a, b)| [a, b]).collect::<Vec<_>>());
            optimizer.step(&mut set, &grads, lr).unwrap();
            for i in 0..reference.len() {
                reference[i] -= lr * CONFIG.weight_decay * reference[i];
                m[i] = CONFIG.beta1 * m[i] + (1.0 - CONFIG.beta1) * g[i];
                v[i] = CONFIG.beta2 * v[i] + (1.0 - CONFIG.beta2) * g[i] * g[i];
                let m_hat = m[i] / (1.0 - CONFIG.beta1.powi(step as i32));
                let v_hat: f64 = v[i] / (1.0 - CONFIG.beta2.powi(step as i32));
                reference[i] -= lr * m_hat / (v_hat.sqrt() + CONFIG.eps);
            }
        }
        assert_eq!(optimizer.updates(), 7);
        for (got, expected) in parameters(&set).iter().zip(&reference) {
            assert!((got - expected).abs() < 2e-6 * expected.abs().max(0.1), "{got} against {expected}");
        }
    }

    #[test]
    fn first_update_moves_each_parameter_by_the_learning_rate() {
        let mut set = adapters();
        let before = parameters(&set);
        let config = OptimizerConfig { weight_decay: 0.0, eps: 1e-12, ..CONFIG };
        AdamW::new(&config, &set).step(&mut set, &grads(1), 1e-2).unwrap();
        assert!(before.iter().zip(parameters(&set)).all(|(x, y)| ((x - y).abs() - 1e-2).abs() < 1e-5));
    }

    #[test]
    fn a_restored_state_goes_on_bit_for_bit() {
        let mut set = adapters();
        let mut optimizer = AdamW::new(&CONFIG, &set);
        (1..=3).for_each(|s| optimizer.step(&mut set, &grads(s), 1e-3).unwrap());
        let mut copy = AdapterSet { rank: 2, alpha: 4.0, adapters: set.adapters.clone() };
        let mut restored = AdamW::restore(&CONFIG, &copy, optimizer.updates(), optimizer.moments().to_vec()).unwrap();
        optimizer.step(&mut set, &grads(4), 1e-3).unwrap();
        restored.step(&mut copy, &grads(4), 1e-3).unwrap();
        assert_eq!(parameters(&set), parameters(&copy));
        assert_eq!(optimizer, restored);
        let mut short = optimizer.moments().to_vec();
        short[0].1.second.pop();
        assert_eq!(AdamW::restore(&CONFIG, &copy, 3, short).unwrap_err().exit_code(), 65);
    }

    #[test]
    fn clipping_scales_to_the_limit_and_reports_the_norm_before() {
        let mut large = grads(1);
        let all = |g: &AdapterGrads| flat(&g.a.iter().chain(&g.b).collect::<Vec<_>>());
        let before = all(&large);
        let expected = before.iter().map(|g| g * g).sum::<f64>().sqrt();
        let norm = clip_grad_norm(&mut large, 0.5).unwrap();
        assert!((norm - expected).abs() < 1e-9);
        let after = all(&large).iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!((after - 0.5).abs() < 1e-5, "{after}");
        for unchanged in [0.0, 1e6] {
            let mut grads = grads(1);
            assert_eq!(clip_grad_norm(&mut grads, unchanged).unwrap(), norm);
            assert_eq!(all(&grads), before);
        }
    }

    #[test]
    fn gradients_of_another_shape_are_refused_and_change_nothing() {
        let mut set = adapters();
        let before = parameters(&set);
        let mut wrong = grads(1);
        wrong.b.pop();
        let mut optimizer = AdamW::new(&CONFIG, &set);
        assert!(optimizer.step(&mut set, &wrong, 1e-2).is_err());
        assert_eq!((optimizer.updates(), parameters(&set)), (0, before));
    }
}
