//! One device, ready to work: context, streams, kernels, the product library and its workspace.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use serenity_protocol::{Error, Result};

use crate::attention::Engines;
use crate::blas::Blas;
use crate::driver::{self, Arg, Context, Kernel, Module, Priority, Ptr, Stream};
use crate::kernels;
use crate::mat::Mat;
use crate::tuning::{Side, Tuning};

/// The oldest generation that has bf16: compute capability 8.0.
pub const CAPABILITY_MIN: u32 = 80;
/// Compute capability of the newest devices that were thought of (Blackwell).
pub const CAPABILITY_KNOWN: u32 = 121;

/// What the device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// As the driver names it.
    pub name: String,
    /// Compute capability, major times ten plus minor.
    pub capability: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: u64,
    /// Most bytes of shared memory that a block may ask for.
    pub shared_bytes_max: u32,
    /// Bytes of device memory.
    pub memory_bytes: u64,
    /// CUDA version of the driver, major and minor.
    pub driver: (u32, u32),
}

/// The driver's own figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that could still be taken.
    pub free: u64,
    /// Bytes of the device.
    pub total: u64,
    /// Bytes gone since the context was opened. The context itself came before; other processes' changes are counted in.
    pub used_by_process_estimate: u64,
}

/// A device with everything that operations on it need. Operations are methods; see [`crate::ops`] and [`crate::gemm`].
#[derive(Debug)]
pub struct Gpu {
    kernels: HashMap<&'static str, Kernel>,
    /// Kept for the kernels in it.
    _modules: Vec<Module>,
    pub(crate) blas: Blas,
    pub(crate) attention: Engines,
    compute: Stream,
    copy: Stream,
    check: Stream,
    /// Behind and before the compute stream.
    sides: [Stream; 2],
    tuning: Cell<Tuning>,
    properties: Properties,
    free_at_open: u64,
    // Last: everything above lives in it.
    context: Arc<Context>,
}

impl Gpu {
    /// Opens device `ordinal`: compiles the kernels (or takes them from the cache) and takes the product library's workspace.
    ///
    /// # Errors
    /// [`Error::Absent`] without driver, device, libnvrtc or libcublasLt, or for a device older than compute capability 8.0;
    /// [`Error::TryAgain`] if it is out of memory.
    pub fn open(ordinal: usize) -> Result<Self> {
        let context = Context::open(ordinal)?;
        let (free_at_open, memory_bytes) = context.memory()?;
        let properties = properties(&context, memory_bytes)?;
        if properties.capability < CAPABILITY_MIN {
            return Err(Error::absent(format!("{} is too old for training in bf16", properties.name))
                .expected("compute capability 8.0 (Ampere) or later")
                .found(format!("{}.{}", properties.capability / 10, properties.capability % 10))
                .advice("choose another device, or the CPU")
                .lasting());
        }
        if properties.capability > CAPABILITY_KNOWN {
            let (major, minor) = (properties.capability / 10, properties.capability % 10);
            tracing::warn!("{} has compute capability {major}.{minor}, newer than any that this program was written for", properties.name);
        }
        let (modules, kernels) = load_kernels(&context, properties.capability)?;
        let stream = |priority| Stream::new(&context, priority);
        let (compute, copy) = (stream(Priority::Normal)?, stream(Priority::Copies)?);
        let check = stream(Priority::Copies)?;
        let sides = [stream(Priority::Last)?, stream(Priority::First)?];
        let blas = Blas::new(&context)?;
        let (modules, attention) = (modules, Engines::default());
        let gpu = Self {
            kernels,
            _modules: modules,
            blas,
            attention,
            compute,
            copy,
            check,
            sides,
            tuning: Cell::default(),
            properties,
            free_at_open,
            context,
        };
        gpu.tune(Tuning::from_environment()?)?;
        Ok(gpu)
    }

    /// How work is laid over streams and multiprocessors.
    #[must_use]
    pub fn tuning(&self) -> Tuning {
        self.tuning.get()
    }

    /// Changes that, after all work has ended.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn tune(&self, tuning: Tuning) -> Result<()> {
        self.sync()?;
        self.blas.plan_for(tuning.multiprocessors);
        self.tuning.set(tuning);
        Ok(())
    }

    /// The stream that dequantisation runs on. It meets the compute stream in events only, unless it is that.
    #[must_use]
    pub fn side(&self) -> &Stream {
        let [last, first] = &self.sides;
        match self.tuning.get().side {
            Side::Off => &self.compute,
            Side::Low => last,
            Side::High => first,
        }
    }

    /// The device's properties.
    #[must_use]
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Its context.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The stream that every operation of this type is queued on.
    #[must_use]
    pub fn compute(&self) -> &Stream {
        &self.compute
    }

    /// The stream for copies from the host, of higher priority.
    #[must_use]
    pub fn copy(&self) -> &Stream {
        &self.copy
    }

    /// The stream that compares copies from the host with their checksums, of the same priority: the next copy does not wait for it.
    #[must_use]
    pub fn check(&self) -> &Stream {
        &self.check
    }

    /// Version of the product library, e.g. 130100.
    #[must_use]
    pub fn blas_version(&self) -> usize {
        self.blas.version()
    }

    /// The driver's figures now.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the context is lost.
    pub fn memory(&self) -> Result<MemoryInfo> {
        let (free, total) = self.context.memory()?;
        Ok(MemoryInfo { free, total, used_by_process_estimate: self.free_at_open.saturating_sub(free) })
    }

    /// Waits for all streams.
    ///
    /// # Errors
    /// A fault of any earlier work.
    pub fn sync(&self) -> Result<()> {
        self.context.sync()
    }

    /// The kernel called `name`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if no unit has it.
    pub fn kernel(&self, name: &str) -> Result<Kernel> {
        self.kernels.get(name).copied().ok_or_else(|| Error::invariant(format!("there is no kernel {name}")))
    }

    /// Queues a kernel on the compute stream; a grid with a zero is no work.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    pub fn launch(&self, name: &str, grid: [u32; 3], block: [u32; 3], shared: u32, args: &[Arg]) -> Result<()> {
        self.kernel(name)?.launch(&self.compute, name, grid, block, shared, args)
    }

    /// Copies to the device, in the order of the compute stream, and waits.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload(&self, to: Ptr, from: &[u8]) -> Result<()> {
        driver::upload(&self.compute, to, from)
    }

    /// Copies from the device after the compute stream's work, and waits.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn download(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        self.compute.sync()?;
        driver::download(&self.context, to, from)
    }

    /// Queues setting every byte of a dense matrix (or of the span of a view) on the compute stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill(&self, mat: Mat, byte: u8) -> Result<()> {
        self.compute.fill(mat.ptr, byte, mat.span())
    }
}

fn properties(context: &Context, memory_bytes: u64) -> Result<Properties> {
    let number = |attribute| context.attribute(attribute).map(|v| u32::try_from(v).unwrap_or(0));
    let major = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok(Properties {
        name: context.name()?,
        capability: major * 10 + number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        l2_bytes: u64::from(number(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        shared_bytes_max: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory_bytes,
        driver: driver::version()?,
    })
}

/// Names of the kernels in a source: what follows `void` in lines that begin with `extern "C" __global__`, and the first argument of
/// `KERNEL(`, which is how the sources instantiate a template for a type (see `kernels/common.cu`).
fn kernel_names(source: &'static str) -> impl Iterator<Item = &'static str> {
    source.lines().filter_map(|line| {
        let rest = match line.strip_prefix("KERNEL(") {
            Some(rest) => rest,
            None => line.strip_prefix("extern \"C\" __global__ ")?.split_once("void ").map(|(_, rest)| rest.trim_start())?,
        };
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        rest.get(..end).filter(|name| !name.is_empty())
    })
}

fn load_kernels(context: &Arc<Context>, capability: u32) -> Result<(Vec<Module>, HashMap<&'static str, Kernel>)> {
    let cache = kernels::cache_folder();
    let mut modules = Vec::new();
    let mut all = HashMap::new();
    for (name, image) in kernels::images(capability, cache.as_deref())? {
        let module = Module::load(context, &image)?;
        let sources = kernels::UNITS.iter().filter(|u| u.name == name).flat_map(|u| u.sources);
        for kernel in sources.flat_map(|(_, text)| kernel_names(text)) {
            if all.insert(kernel, module.kernel(kernel)?).is_some() {
                return Err(Error::invariant(format!("two kernels are called {kernel}")));
            }
        }
        modules.push(module);
    }
    Ok((modules, all))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn kernel_names_are_read_off_the_sources() {
        let source = "#define KERNEL(n) x\nKERNEL(one_bf16, one<bf16, 8>, (int a))\nextern \"C\" __global__ void two(int a) {}\n  KERNEL(no)\n\
                      extern \"C\" __global__ __launch_bounds__(256, 1) void three() {}\n__global__ void no() {}";
        assert_eq!(kernel_names(source).collect::<Vec<_>>(), ["one_bf16", "two", "three"]);
    }

    #[test]
    fn every_source_has_kernels_and_no_name_occurs_twice() {
        let mut seen = std::collections::HashSet::new();
        for unit in kernels::UNITS {
            for (file, text) in unit.sources.iter().filter(|(f, _)| *f != "common.cu") {
                assert!(kernel_names(text).count() > 0, "{file}");
                assert!(kernel_names(text).all(|k| seen.insert(k)), "{file}: a name occurs twice");
            }
        }
        assert!(seen.contains("dequant_rows_bf16"), "{seen:?}");
    }
}
