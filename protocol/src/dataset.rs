//! The training images and their captions, as found on disk.
//!
//! A concept is one folder (not its subfolders) of jpg, jpeg, png or webp files, each with a caption file of the same stem beside it.
//! Samples come in the order of the concepts and, within a concept, sorted by path, so that every process counts them alike.
//! Nothing is decoded here: an unreadable image is found by the encoder, which needs its pixels.
//!
//! A caption is the file's UTF-8 text without a byte order mark and without white space at its two ends (editors end files with a
//! newline that no author meant). An empty caption is a caption.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use crate::config::{Concept, DataConfig};
use crate::error::{Error, Result};

/// Endings of files taken for images, compared without regard to case.
pub const IMAGE_ENDINGS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];
/// A caption file larger than this is refused: it is no caption.
const CAPTION_BYTES_MAX: u64 = 1 << 20;
/// How many files an error message names.
const NAMED_MAX: usize = 10;

/// One image with its caption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Image file.
    pub image: PathBuf,
    /// Caption file.
    pub caption_file: PathBuf,
    /// Caption, trimmed (see the module).
    pub caption: String,
    /// How often the image counts in an epoch.
    pub repeats: usize,
}

/// All samples of all concepts.
///
/// # Errors
/// [`Error::Absent`] for a missing folder; [`Error::Config`] where no concept is named; [`Error::Data`] for a folder without images, an
/// image without caption (naming them), and a caption that is not UTF-8 text.
pub fn scan(data: &DataConfig) -> Result<Vec<Sample>> {
    if data.concepts.is_empty() {
        return Err(Error::config("no images are given")
            .expected("at least one folder in data.concepts, or --data DIR")
            .advice("add --data DIR with a folder of images that have a caption file (.txt) beside each"));
    }
    let mut samples = Vec::new();
    for concept in &data.concepts {
        scan_concept(concept, &mut samples)?;
    }
    Ok(samples)
}

fn scan_concept(concept: &Concept, samples: &mut Vec<Sample>) -> Result<()> {
    let images = images_of(&concept.path)?;
    if images.is_empty() {
        return Err(Error::data("the folder holds no images")
            .at(&concept.path)
            .expected(format!("files ending in {}", IMAGE_ENDINGS.join(", ")))
            .advice("check data.concepts[].path; subfolders are not searched, give each as a concept of its own"));
    }
    let caption_of = |image: &Path| image.with_extension(concept.caption_file_ext.trim_start_matches('.'));
    let bare: Vec<&PathBuf> = images.iter().filter(|image| !caption_of(image).is_file()).collect();
    if !bare.is_empty() {
        return Err(Error::data(format!("{} of {} images have no caption", bare.len(), images.len()))
            .at(&concept.path)
            .expected(format!("a {} file beside each image", concept.caption_file_ext))
            .found(format!("none for {}", names(&bare)))
            .advice("write the captions, move these images away, or set caption_file_ext of the concept"));
    }
    for image in images {
        let caption_file = caption_of(&image);
        let caption = read_caption(&caption_file)?;
        samples.push(Sample { image, caption_file, caption, repeats: concept.repeats });
    }
    Ok(())
}

fn images_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e: std::io::Error| {
        Error::absent("cannot read the image folder")
            .at(folder)
            .cause(e)
            .advice("check data.concepts[].path (or --data DIR); relative paths start at the working directory")
    };
    let mut images = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        // Names that start with a dot are what file managers leave beside images of the same ending.
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        if !hidden && IMAGE_ENDINGS.contains(&ending.as_str()) && path.is_file() {
            images.push(path);
        }
    }
    images.sort();
    Ok(images)
}

fn read_caption(file: &Path) -> Result<String> {
    let failed = |e| Error::io("cannot read the caption", file, e);
    let bytes_len = std::fs::metadata(file).map_err(failed)?.len();
    if bytes_len > CAPTION_BYTES_MAX {
        return Err(Error::data("the caption file is too long to be a caption")
            .at(file)
            .expected(format!("at most {CAPTION_BYTES_MAX} bytes"))
            .found(bytes_len));
    }
    let bytes = std::fs::read(file).map_err(failed)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to() as u64;
        Error::data("the caption is not UTF-8 text").at(file).offset(offset).advice("save the file as UTF-8")
    })?;
    Ok(text.trim_start_matches('\u{feff}').trim().to_string())
}

fn names(paths: &[&PathBuf]) -> String {
    let mut text: Vec<String> =
        paths.iter().take(NAMED_MAX).map(|p| p.file_name().unwrap_or(p.as_os_str()).to_string_lossy().into_owned()).collect();
    if paths.len() > NAMED_MAX {
        text.push(format!("and {} more", paths.len() - NAMED_MAX));
    }
    text.join(", ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn data(folders: &[&Path]) -> DataConfig {
        let concepts = folders.iter().map(|p| Concept { path: p.to_path_buf(), caption_file_ext: ".txt".into(), repeats: 2 }).collect();
        DataConfig { concepts, cache_dir: PathBuf::new() }
    }

    #[test]
    fn samples_are_sorted_and_captions_trimmed() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.PNG", "a.jpg", "c.webp", ".hidden.jpg", "notes.md"] {
            std::fs::write(dir.path().join(name), b"x").unwrap();
        }
        std::fs::write(dir.path().join("a.txt"), "\u{feff}  naïve café \r\n").unwrap();
        std::fs::write(dir.path().join("b.txt"), "two\nlines\n").unwrap();
        std::fs::write(dir.path().join("c.txt"), "").unwrap();
        let samples = scan(&data(&[dir.path()])).unwrap();
        let captions: Vec<&str> = samples.iter().map(|s| s.caption.as_str()).collect();
        assert_eq!(captions, ["naïve café", "two\nlines", ""]);
        assert!(samples.iter().all(|s| s.repeats == 2));
    }

    #[test]
    fn what_is_missing_is_named_with_its_exit_code() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(scan(&data(&[])).unwrap_err().exit_code(), 64);
        assert_eq!(scan(&data(&[&dir.path().join("absent")])).unwrap_err().exit_code(), 69);
        assert_eq!(scan(&data(&[dir.path()])).unwrap_err().exit_code(), 65);
        std::fs::write(dir.path().join("lonely.jpg"), b"x").unwrap();
        let error = scan(&data(&[dir.path()])).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        assert!(error.to_string().contains("lonely.jpg"), "{error}");
        std::fs::write(dir.path().join("lonely.txt"), [b'a', 0xff]).unwrap();
        let error = scan(&data(&[dir.path()])).unwrap_err();
        assert!(error.to_string().contains("byte offset 1"), "{error}");
    }
}
