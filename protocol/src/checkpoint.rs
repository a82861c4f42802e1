//! Read access to a checkpoint component: one safetensors file, or a sharded folder with its index.
//!
//! Only headers are parsed; tensor bytes are handed out as slices of a private read-only map (memmap2), so a 64 GB checkpoint costs
//! no memory until a tensor is touched. Shards are opened when first needed. The files must not be truncated by others while in use:
//! that is the one way to get a SIGBUS here, and why the slab's payload (streamed for hours) is read with read(2) instead.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::SafeTensors;

use crate::error::{Error, Result};

/// One tensor of a checkpoint: type, shape and its little-endian bytes.
pub struct TensorRef {
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    map: Arc<Mmap>,
    start: usize,
    end: usize,
}

impl TensorRef {
    /// The raw little-endian bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.start..self.end]
    }

    /// The values as float32 (exact for F32, BF16 and F16).
    ///
    /// # Errors
    /// [`Error::Data`] for any other type.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let b = self.bytes();
        Ok(match self.dtype {
            Dtype::F32 => b.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
            Dtype::BF16 => b.chunks_exact(2).map(|c| half::bf16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
            Dtype::F16 => b.chunks_exact(2).map(|c| half::f16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
            other => return Err(Error::data("a tensor has an unsupported type").expected("F32, BF16 or F16").found(format!("{other:?}"))),
        })
    }
}

struct Shard {
    map: Arc<Mmap>,
    tensors: HashMap<String, (Dtype, Vec<usize>, usize, usize)>,
}

/// Where a tensor lies, for readers that do not go through the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlace {
    /// The file.
    pub file: PathBuf,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Absolute byte range in the file.
    pub range: std::ops::Range<u64>,
}

/// The tensors of one component (transformer, text encoder, VAE), by name.
pub struct Checkpoint {
    root: PathBuf,
    /// Tensor name to shard file.
    index: BTreeMap<String, PathBuf>,
    shards: Mutex<HashMap<PathBuf, Arc<Shard>>>,
}

impl Checkpoint {
    /// Opens `path`: a `.safetensors` file, or a folder with `*.safetensors.index.json`, or one with a single `.safetensors` file.
    ///
    /// # Errors
    /// [`Error::Absent`] where nothing is found, [`Error::Data`] where an index or header is malformed or names a file outside the folder.
    pub fn open(path: &Path) -> Result<Self> {
        let mut this = Self { root: path.to_path_buf(), index: BTreeMap::new(), shards: Mutex::default() };
        if path.is_file() {
            this.add_whole_file(path)?;
            return Ok(this);
        }
        let mut files: Vec<PathBuf> = std::fs::read_dir(path)
            .map_err(|e| Error::io("cannot open the checkpoint folder", path, e))?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .collect();
        files.sort();
        let named = |end: &str| files.iter().filter(|p| p.to_string_lossy().ends_with(end)).cloned().collect::<Vec<_>>();
        let (indexes, singles) = (named(".safetensors.index.json"), named(".safetensors"));
        match (indexes.as_slice(), singles.as_slice()) {
            ([index], _) => this.add_index(index)?,
            ([], [single]) => this.add_whole_file(single)?,
            (found, singles) => {
                return Err(Error::absent("the folder holds no usable checkpoint")
                    .at(path)
                    .expected("one *.safetensors.index.json, or exactly one *.safetensors file")
                    .found(format!("{} index files, {} safetensors files", found.len(), singles.len())));
            }
        }
        Ok(this)
    }

    fn add_whole_file(&mut self, file: &Path) -> Result<()> {
        let shard = self.shard(file)?;
        self.index = shard.tensors.keys().map(|k| (k.clone(), file.to_path_buf())).collect();
        Ok(())
    }

    fn add_index(&mut self, file: &Path) -> Result<()> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read_to_string(file).map_err(|e| Error::io("cannot read the shard index", file, e))?;
        let index: Index = serde_json::from_str(&text).map_err(|e| Error::data("the shard index is malformed").at(file).cause(e))?;
        for (name, shard) in index.weight_map {
            // A shard is a plain file name: anything else could point out of the folder.
            if shard.contains(['/', '\\']) || shard == ".." || !shard.ends_with(".safetensors") {
                return Err(Error::data("the shard index names a file outside its folder").at(file).found(shard));
            }
            self.index.insert(name, self.root.join(shard));
        }
        Ok(())
    }

    fn shard(&self, file: &Path) -> Result<Arc<Shard>> {
        let mut shards = self.shards.lock().map_err(|_| Error::invariant("a thread panicked while it opened a shard"))?;
        if let Some(found) = shards.get(file) {
            return Ok(found.clone());
        }
        let shard = Arc::new(open_shard(file)?);
        shards.insert(file.to_path_buf(), shard.clone());
        Ok(shard)
    }

    /// The folder or file that was opened.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The distinct files behind the tensors, sorted.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = self.index.values().cloned().collect();
        files.sort();
        files.dedup();
        files
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// Whether a tensor of that name is listed.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The tensor of that exact name.
    ///
    /// # Errors
    /// [`Error::Data`] if it is not there.
    pub fn tensor(&self, name: &str) -> Result<TensorRef> {
        let missing = || Error::data(format!("the checkpoint has no tensor '{name}'")).at(&self.root);
        let file = self.index.get(name).ok_or_else(missing)?;
        let shard = self.shard(file)?;
        let (dtype, shape, start, end) = shard.tensors.get(name).cloned().ok_or_else(|| missing().at(file))?;
        Ok(TensorRef { dtype, shape, map: shard.map.clone(), start, end })
    }

    /// Where the tensor of that exact name lies.
    ///
    /// # Errors
    /// [`Error::Data`] if it is not there.
    pub fn place(&self, name: &str) -> Result<TensorPlace> {
        let tensor = self.tensor(name)?;
        let file = self.index.get(name).cloned().unwrap_or_default();
        Ok(TensorPlace { file, dtype: tensor.dtype, shape: tensor.shape, range: tensor.start as u64..tensor.end as u64 })
    }

    /// The tensor of that name, checked to have `shape`.
    ///
    /// # Errors
    /// [`Error::Data`] if it is missing or of another shape.
    pub fn tensor_of_shape(&self, name: &str, shape: &[usize]) -> Result<TensorRef> {
        let tensor = self.tensor(name)?;
        if tensor.shape != shape {
            return Err(Error::data(format!("tensor '{name}' has another shape than the configuration gives it"))
                .at(&self.root)
                .expected(format!("{shape:?}"))
                .found(format!("{:?}", tensor.shape)));
        }
        Ok(tensor)
    }
}

fn open_shard(path: &Path) -> Result<Shard> {
    let file = File::open(path).map_err(|e| Error::io("cannot open the checkpoint file", path, e))?;
    // SAFETY: the map is private and read-only; the module documentation states the one assumption, that nobody truncates the file
    // while it is open.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("cannot map the checkpoint file", path, e))?;
    let (header_bytes, metadata) =
        SafeTensors::read_metadata(&map).map_err(|e| Error::data("the safetensors header is malformed").at(path).cause(e))?;
    let payload = header_bytes + 8;
    let mut tensors = HashMap::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = (payload + info.data_offsets.0, payload + info.data_offsets.1);
        if end > map.len() {
            return Err(Error::data(format!("the file ends inside tensor '{name}'"))
                .at(path)
                .offset(start as u64)
                .expected(format!("at least {end} bytes"))
                .found(format!("{} bytes", map.len()))
                .advice("download or copy the file again"));
        }
        tensors.insert(name, (info.dtype, info.shape.clone(), start, end));
    }
    Ok(Shard { map: Arc::new(map), tensors })
}
