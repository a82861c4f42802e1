//! cuDNN's backend API, thin and safe: descriptors, plans, execution. What the graphs mean is in [`super::graph`].
//!
//! Everything in that API is a descriptor with attributes that is finalised once. A [`Descriptor`] is destroyed in drop; a [`Plan`] keeps the
//! descriptors that it was made from. Functions are looked up once and called with integer return codes: a status that these bindings do
//! not know stays a number, and a function that an old library lacks is an error that names it.
//!
//! A plan runs on the stream of its [`Cudnn`] with the workspace that the caller gives; nothing is allocated by a run.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type, cudnnBackendDescriptorType_t as Kind,
    cudnnBackendHeurMode_t, cudnnDataType_t, cudnnPointwiseMode_t, cudnnReduceTensorOp_t,
};
use serenity_protocol::{Error, Result};

use crate::driver::{Context, Ptr, Stream};
use crate::libraries::{Library, require, require_file};

/// The oldest version whose fused attention needs no workarounds for lengths that are no multiples of 64.
const VERSION_MIN: usize = 90_100;

/// Bytes of a message that the library may give.
const MESSAGE_BYTES: usize = 1024;

type Handle = *mut c_void;
type Raw = sys::cudnnBackendDescriptor_t;

/// The library's functions that are called here.
struct Functions {
    version: unsafe extern "C" fn() -> usize,
    runtime: unsafe extern "C" fn() -> usize,
    create: unsafe extern "C" fn(*mut Handle) -> u32,
    destroy: unsafe extern "C" fn(Handle) -> u32,
    set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> u32,
    last_error: unsafe extern "C" fn(*mut c_char, usize),
    make: unsafe extern "C" fn(Kind, *mut Raw) -> u32,
    unmake: unsafe extern "C" fn(Raw) -> u32,
    set: unsafe extern "C" fn(Raw, Name, Type, i64, *const c_void) -> u32,
    get: unsafe extern "C" fn(Raw, Name, Type, i64, *mut i64, *mut c_void) -> u32,
    finalize: unsafe extern "C" fn(Raw) -> u32,
    execute: unsafe extern "C" fn(Handle, Raw, Raw) -> u32,
}

impl Functions {
    fn load() -> Result<Self> {
        require(Library::Cudnn)?;
        // SAFETY: the library is there (just probed) and stays loaded for the rest of the process.
        let library = unsafe { sys::culib() };
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field's type is the function's declaration in cudnn_graph.h, with `cudnnStatus_t` as the 32-bit number it is.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|e| Error::absent(format!("cuDNN is too old: it has no {}", $name)).advice("install cuDNN 9").cause(e))?
            };
        }
        let functions = Self {
            version: function!("cudnnGetVersion"),
            runtime: function!("cudnnGetCudartVersion"),
            create: function!("cudnnCreate"),
            destroy: function!("cudnnDestroy"),
            set_stream: function!("cudnnSetStream"),
            last_error: function!("cudnnGetLastErrorString"),
            make: function!("cudnnBackendCreateDescriptor"),
            unmake: function!("cudnnBackendDestroyDescriptor"),
            set: function!("cudnnBackendSetAttribute"),
            get: function!("cudnnBackendGetAttribute"),
            finalize: function!("cudnnBackendFinalize"),
            execute: function!("cudnnBackendExecute"),
        };
        // cuDNN ends the process when it cannot find the libraries of the CUDA version that it was built for.
        // SAFETY: no precondition.
        let major = unsafe { (functions.runtime)() } / 1000;
        require_file(&format!("libcublasLt.so.{major}"))?;
        require_file(&format!("libnvrtc.so.{major}"))?;
        Ok(functions)
    }

    /// Turns a status into an error with the library's own words: [`Error::Absent`] for what it does not support (4 digits from 3000 on),
    /// [`Error::TryAgain`] out of memory.
    fn check(&self, status: u32, what: &str) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let mut text = [0u8; MESSAGE_BYTES];
        // SAFETY: the library writes at most the given number of bytes.
        unsafe { (self.last_error)(text.as_mut_ptr().cast(), text.len()) };
        let text = String::from_utf8_lossy(text.split(|b| *b == 0).next().unwrap_or_default()).into_owned();
        let error = match status {
            3000..4000 | 1000..1010 => Error::absent(format!("cuDNN does not support {what}")),
            4003 | 4004 => Error::try_again(format!("cuDNN is out of memory: {what}")),
            _ => Error::invariant(format!("cuDNN fails: {what}")),
        };
        Err(error.cause(format!("status {status}: {text}")))
    }
}

impl std::fmt::Debug for Functions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Functions")
    }
}

/// What plans are made for.
#[derive(Debug)]
enum Target {
    /// The device of an opened library.
    Opened { handle: Handle, context: Arc<Context> },
    /// A device known by its description only: plans are made (and compiled), never run. For tests on machines without a device.
    #[cfg(test)]
    Described(std::mem::ManuallyDrop<Raw>),
}

/// The opened library.
#[derive(Debug)]
pub struct Cudnn {
    functions: Functions,
    target: Target,
    /// Held while the handle is used.
    turn: Mutex<()>,
}

// SAFETY: handle and descriptors are not tied to a thread; the context is made current before use.
unsafe impl Send for Cudnn {}
// SAFETY: the library may be called from several threads, but a handle by one at a time (cuDNN's documentation): whatever passes the handle, or a
// descriptor that holds it, holds `turn`.
unsafe impl Sync for Cudnn {}

impl Cudnn {
    /// Opens the library for `stream`, which everything runs on.
    ///
    /// # Errors
    /// [`Error::Absent`] without the library or with one older than 9.1.
    pub fn open(stream: &Stream) -> Result<Self> {
        let functions = Functions::load()?;
        // SAFETY: no precondition.
        let version = unsafe { (functions.version)() };
        if version < VERSION_MIN {
            return Err(Error::absent("cuDNN is too old").expected("9.1 or later").found(version).advice("install a newer cuDNN 9"));
        }
        let context = stream.context().clone();
        context.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` outlives the call; a context is current. Destroyed once, in drop.
        functions.check(unsafe { (functions.create)(&mut handle) }, "opening the library")?;
        let opened = Self { functions, target: Target::Opened { handle, context }, turn: Mutex::new(()) };
        // SAFETY: handle and stream live; the stream belongs to a context that `opened` keeps, and the caller keeps the stream (both are
        // fields of one Gpu).
        opened.functions.check(unsafe { (opened.functions.set_stream)(handle, stream.raw().cast()) }, "choosing the stream")?;
        Ok(opened)
    }

    /// Version of the library, e.g. 91900.
    #[must_use]
    pub fn version(&self) -> usize {
        // SAFETY: no precondition.
        unsafe { (self.functions.version)() }
    }

    /// Waits for the handle. The lock guards no data, so a panic of its last holder spoils nothing.
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bind(&self) -> Result<()> {
        match &self.target {
            Target::Opened { context, .. } => context.bind(),
            #[cfg(test)]
            Target::Described(_) => Ok(()),
        }
    }
}

impl Drop for Cudnn {
    fn drop(&mut self) {
        match &mut self.target {
            Target::Opened { handle, context } => {
                if context.bind().is_ok() {
                    // SAFETY: created in `open`, destroyed only here; plans hold an Arc of this.
                    let _ = unsafe { (self.functions.destroy)(*handle) };
                }
            }
            #[cfg(test)]
            Target::Described(raw) => {
                // SAFETY: created by the test's constructor, destroyed only here.
                let _ = unsafe { (self.functions.unmake)(**raw) };
            }
        }
    }
}

/// The value of an attribute, with the type that the library expects for it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    Numbers(&'a [i64]),
    Flag(bool),
    Data(cudnnDataType_t),
    Pointwise(cudnnPointwiseMode_t),
    Reduction(cudnnReduceTensorOp_t),
    Heuristic(cudnnBackendHeurMode_t),
    Descriptors(&'a [&'a Descriptor]),
}

/// One descriptor, destroyed in drop.
#[derive(Debug)]
pub(super) struct Descriptor {
    raw: Raw,
    library: Arc<Cudnn>,
}

// SAFETY: a descriptor is data of the library, not tied to a thread.
unsafe impl Send for Descriptor {}
// SAFETY: shared ones are finalised, which makes them constant; attributes are set by the thread that made them, before it shares them.
unsafe impl Sync for Descriptor {}

impl Descriptor {
    /// An empty one.
    pub(super) fn new(library: &Arc<Cudnn>, kind: Kind) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call. Destroyed once, in drop.
        let status = unsafe { (library.functions.make)(kind, &mut raw) };
        library.functions.check(status, &format!("{kind:?}"))?;
        Ok(Self { raw, library: library.clone() })
    }

    /// One with these attributes, finalised.
    pub(super) fn finished(library: &Arc<Cudnn>, kind: Kind, attributes: &[(Name, Value<'_>)]) -> Result<Self> {
        let descriptor = Self::new(library, kind)?;
        attributes.iter().try_for_each(|(name, value)| descriptor.set(*name, *value))?;
        descriptor.finalize(&format!("{kind:?}"))?;
        Ok(descriptor)
    }

    fn set(&self, name: Name, value: Value<'_>) -> Result<()> {
        match value {
            Value::Numbers(numbers) => self.put(name, Type::CUDNN_TYPE_INT64, numbers),
            Value::Flag(flag) => self.put(name, Type::CUDNN_TYPE_BOOLEAN, &[flag]),
            Value::Data(ty) => self.put(name, Type::CUDNN_TYPE_DATA_TYPE, &[ty]),
            Value::Pointwise(mode) => self.put(name, Type::CUDNN_TYPE_POINTWISE_MODE, &[mode]),
            Value::Reduction(mode) => self.put(name, Type::CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, &[mode]),
            Value::Heuristic(mode) => self.put(name, Type::CUDNN_TYPE_HEUR_MODE, &[mode]),
            Value::Descriptors(all) => {
                let raw: Vec<Raw> = all.iter().map(|d| d.raw).collect();
                self.put(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &raw)
            }
        }
    }

    /// `values` as an attribute of `ty`; T is what the library reads for it.
    fn put<T: Copy>(&self, name: Name, ty: Type, values: &[T]) -> Result<()> {
        let count = i64::try_from(values.len()).map_err(|_| Error::invariant("too many values for an attribute"))?;
        // SAFETY: the descriptor lives; the library copies `count` elements of the type that `ty` names (see `set`) during the call.
        let status = unsafe { (self.library.functions.set)(self.raw, name, ty, count, values.as_ptr().cast()) };
        self.library.functions.check(status, &format!("{name:?}"))
    }

    fn finalize(&self, what: &str) -> Result<()> {
        // SAFETY: the descriptor lives.
        self.library.functions.check(unsafe { (self.library.functions.finalize)(self.raw) }, what)
    }

    /// The number in an attribute.
    fn number(&self, name: Name) -> Result<i64> {
        let (mut count, mut value) = (0i64, 0i64);
        // SAFETY: the library writes one number and the count, both locals.
        let status = unsafe {
            (self.library.functions.get)(self.raw, name, Type::CUDNN_TYPE_INT64, 1, &mut count, std::ptr::from_mut(&mut value).cast())
        };
        self.library.functions.check(status, &format!("{name:?}"))?;
        if count == 1 { Ok(value) } else { Err(Error::invariant(format!("cuDNN has no {name:?}"))) }
    }

    /// How many values an attribute that holds descriptors has.
    fn count(&self, name: Name) -> Result<usize> {
        let mut count = 0i64;
        let ty = Type::CUDNN_TYPE_BACKEND_DESCRIPTOR;
        // SAFETY: asked for no element, the library writes the count only.
        let status = unsafe { (self.library.functions.get)(self.raw, name, ty, 0, &mut count, std::ptr::null_mut()) };
        self.library.functions.check(status, &format!("{name:?}"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The descriptors in an attribute: the library fills in empty ones of `kind`. At most `limit`.
    fn descriptors(&self, name: Name, kind: Kind, limit: usize) -> Result<Vec<Descriptor>> {
        let mut all = (0..limit).map(|_| Descriptor::new(&self.library, kind)).collect::<Result<Vec<_>>>()?;
        let mut raw: Vec<Raw> = all.iter().map(|d| d.raw).collect();
        let (requested, mut count) = (i64::try_from(limit).unwrap_or(0), 0i64);
        let ty = Type::CUDNN_TYPE_BACKEND_DESCRIPTOR;
        // SAFETY: `raw` has `requested` live descriptors, which the library fills in; `count` is a local.
        let status = unsafe { (self.library.functions.get)(self.raw, name, ty, requested, &mut count, raw.as_mut_ptr().cast()) };
        self.library.functions.check(status, &format!("{name:?}"))?;
        all.truncate(usize::try_from(count).unwrap_or(0));
        Ok(all)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed only here.
        let _ = unsafe { (self.library.functions.unmake)(self.raw) };
    }
}

/// What a graph's tensor is bound to when a plan runs.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bound {
    /// Device memory.
    Device(Ptr),
    /// A number that is passed by value.
    Scalar(f32),
}

/// A compiled graph.
#[derive(Debug)]
pub(super) struct Plan {
    plan: Descriptor,
    workspace_bytes: usize,
    /// The graph and its parts.
    _parts: Vec<Descriptor>,
}

impl Plan {
    /// The first plan, in the order that the library's heuristics prefer, that compiles and needs at most `workspace_max` bytes for the
    /// operations in `parts` (in order, other descriptors they refer to in front of them do not count).
    ///
    /// # Errors
    /// [`Error::Absent`] if there is none.
    pub(super) fn new(library: &Arc<Cudnn>, operations: Vec<Descriptor>, others: Vec<Descriptor>, workspace_max: usize) -> Result<Self> {
        library.bind()?;
        let _turn = library.turn();
        let graph = Descriptor::new(library, Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?;
        match &library.target {
            Target::Opened { handle, .. } => graph.put(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, Type::CUDNN_TYPE_HANDLE, &[*handle])?,
            #[cfg(test)]
            Target::Described(_) => {}
        }
        let references: Vec<&Descriptor> = operations.iter().collect();
        graph.set(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, Value::Descriptors(&references))?;
        graph.finalize("a graph of operations")?;
        let mut refused = String::from("no engine");
        for mode in [cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A, cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_FALLBACK] {
            for config in configurations(library, &graph, mode)? {
                match compile(library, &config) {
                    Ok((plan, workspace_bytes)) if workspace_bytes <= workspace_max => {
                        let mut parts = vec![config, graph];
                        parts.extend(operations);
                        parts.extend(others);
                        return Ok(Self { plan, workspace_bytes, _parts: parts });
                    }
                    Ok((_, bytes)) => refused = format!("a plan needs {bytes} bytes of workspace, {workspace_max} are allowed"),
                    Err(e) => refused = e.to_string(),
                }
            }
        }
        Err(Error::absent("cuDNN has no plan for this attention").cause(refused))
    }

    /// Whether it was made with `library`, whose stream it runs on.
    pub(super) fn is_of(&self, library: &Arc<Cudnn>) -> bool {
        Arc::ptr_eq(&self.plan.library, library)
    }

    /// Bytes of workspace that a run needs.
    pub(super) fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Queues a run on the library's stream. `bindings` has every tensor of the graph that is not virtual, by its number.
    ///
    /// # Errors
    /// The library's; a fault of earlier work may show here too.
    pub(super) fn run(&self, bindings: &[(i64, Bound)], workspace: Ptr) -> Result<()> {
        let library = &self.plan.library;
        let handle = match &library.target {
            Target::Opened { handle, .. } => *handle,
            #[cfg(test)]
            Target::Described(_) => return Err(Error::invariant("a plan without a device cannot run")),
        };
        library.bind()?;
        let numbers: Vec<i64> = bindings.iter().map(|(number, _)| *number).collect();
        // Scalars are read through host pointers during `execute`, while this vector lives and does not move.
        let mut scalars: Vec<f32> = bindings.iter().map(|(_, bound)| if let Bound::Scalar(v) = bound { *v } else { 0.0 }).collect();
        let pointers: Vec<*mut c_void> = bindings
            .iter()
            .zip(&mut scalars)
            .map(|((_, bound), scalar)| match bound {
                Bound::Device(ptr) => ptr.address() as *mut c_void,
                Bound::Scalar(_) => std::ptr::from_mut(scalar).cast(),
            })
            .collect();
        let pack = Descriptor::new(library, Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?;
        pack.set(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, Value::Numbers(&numbers))?;
        pack.put(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, Type::CUDNN_TYPE_VOID_PTR, &pointers)?;
        pack.put(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, Type::CUDNN_TYPE_VOID_PTR, &[workspace.address() as *mut c_void])?;
        pack.finalize("the operands of a plan")?;
        let _turn = library.turn();
        // SAFETY: handle, plan and pack live; device addresses come from live reservations of an arena, with the sizes that the graph declares
        // (checked by the caller); scalars outlive the call.
        let status = unsafe { (library.functions.execute)(handle, self.plan.raw, pack.raw) };
        library.functions.check(status, "running a plan")
    }
}

/// What the library's heuristics propose for a graph.
fn configurations(library: &Arc<Cudnn>, graph: &Descriptor, mode: cudnnBackendHeurMode_t) -> Result<Vec<Descriptor>> {
    let heuristics = Descriptor::new(library, Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?;
    heuristics.set(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, Value::Descriptors(&[graph]))?;
    heuristics.set(Name::CUDNN_ATTR_ENGINEHEUR_MODE, Value::Heuristic(mode))?;
    #[cfg(test)]
    if let Target::Described(device) = &library.target {
        heuristics.put(Name::CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[**device])?;
    }
    heuristics.finalize("the heuristics of a graph")?;
    let count = heuristics.count(Name::CUDNN_ATTR_ENGINEHEUR_RESULTS)?;
    heuristics.descriptors(Name::CUDNN_ATTR_ENGINEHEUR_RESULTS, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, count)
}

/// A plan of one configuration and the workspace that it needs.
fn compile(library: &Arc<Cudnn>, config: &Descriptor) -> Result<(Descriptor, usize)> {
    let plan = Descriptor::new(library, Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?;
    match &library.target {
        Target::Opened { handle, .. } => plan.put(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, Type::CUDNN_TYPE_HANDLE, &[*handle])?,
        #[cfg(test)]
        Target::Described(_) => {}
    }
    plan.set(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, Value::Descriptors(&[config]))?;
    plan.finalize("a plan")?;
    let bytes = plan.number(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?;
    Ok((plan, usize::try_from(bytes).map_err(|_| Error::invariant("cuDNN names a negative workspace").found(bytes))?))
}

#[cfg(test)]
impl Cudnn {
    /// A library that makes plans for a device of which only this JSON description is known (cuDNN 9.8 and later).
    pub(super) fn described(json: &str) -> Result<Self> {
        let functions = Functions::load()?;
        let (kind, name) = (Kind::CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, Name::CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION);
        let text = std::ffi::CString::new(json).map_err(|e| Error::invariant("the description has a zero").cause(e))?;
        let bytes = text.as_bytes_with_nul();
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call.
        functions.check(unsafe { (functions.make)(kind, &mut raw) }, "describing a device")?;
        let library = Self { functions, target: Target::Described(std::mem::ManuallyDrop::new(raw)), turn: Mutex::new(()) };
        // SAFETY: the descriptor lives; the library copies the given number of characters.
        let set = unsafe { (library.functions.set)(raw, name, Type::CUDNN_TYPE_CHAR, bytes.len() as i64, bytes.as_ptr().cast()) };
        library.functions.check(set, "describing a device")?;
        // SAFETY: the descriptor lives.
        library.functions.check(unsafe { (library.functions.finalize)(raw) }, "describing a device")?;
        Ok(library)
    }
}
