//! An image file to the pixels that the VAE sees.
//!
//! As the reference trainer prepares them: EXIF orientation applied; RGB, where an alpha channel is dropped (not blended), as PIL's
//! `convert("RGB")` does; resized to cover the square, with the antialiased bilinear filter of PIL on 8-bit values; centre crop; then
//! `x / 127.5 - 1`. Jpeg, png and webp are told apart by content, not by the name's ending.

use std::io::Cursor;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fast_image_resize::images::Image;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use serenity_protocol::{Error, Result};

use crate::tensor::failed;

/// Largest side of an image accepted, a guard against headers that promise anything.
const SIDE_MAX: u32 = 1 << 16;
/// Largest memory that decoding an image may take.
const DECODE_BYTES_MAX: u64 = 4 << 30;

/// 8-bit RGB pixels, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `[height, width, 3]`.
    pub rgb: Vec<u8>,
}

impl Pixels {
    /// The image in `bytes` (the content of `path`, which is only named in errors), as a square of `resolution` pixels.
    ///
    /// # Errors
    /// [`Error::Data`] naming the file if it cannot be decoded.
    pub fn prepare(bytes: &[u8], path: &Path, resolution: u32) -> Result<Self> {
        let rgb = decode(bytes, path)?.into_rgb8();
        let (width, height) = rgb.dimensions();
        let (cover_width, cover_height) = cover(width, height, resolution);
        let size = 3 * u64::from(cover_width) * u64::from(cover_height);
        if size > DECODE_BYTES_MAX {
            return Err(Error::data("the image is too long and thin to be cut to a square")
                .at(path)
                .expected(format!("at most {DECODE_BYTES_MAX} bytes with the shorter side at {resolution} pixels"))
                .found(format!("{width} x {height} pixels, {size} bytes then"))
                .advice("crop it, or take it out of the data"));
        }
        let unreadable = |e: &dyn std::fmt::Display| Error::data("the image cannot be resized").at(path).cause(e);
        let source = Image::from_vec_u8(width, height, rgb.into_raw(), PixelType::U8x3).map_err(|e| unreadable(&e))?;
        let mut target = Image::new(cover_width, cover_height, PixelType::U8x3);
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
        Resizer::new().resize(&source, &mut target, &options).map_err(|e| unreadable(&e))?;
        let whole = Self { width: cover_width as usize, height: cover_height as usize, rgb: target.into_vec() };
        Ok(whole.centre_crop(resolution as usize))
    }

    fn centre_crop(&self, side: usize) -> Self {
        let (left, top) = (crop_start(self.width, side), crop_start(self.height, side));
        let rgb = self.rgb.chunks_exact(self.width * 3).skip(top).take(side).flat_map(|row| &row[left * 3..(left + side) * 3]).copied();
        Self { width: side, height: side, rgb: rgb.collect() }
    }

    /// `[1, 3, height, width]` in -1 to 1.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn to_tensor(&self, device: &Device, dtype: DType) -> Result<Tensor> {
        Tensor::from_slice(&self.rgb, (1, self.height, self.width, 3), &Device::Cpu)
            .and_then(|t| t.permute((0, 3, 1, 2))?.contiguous())
            .and_then(|t| normalise(&t))
            .and_then(|t| t.to_device(device)?.to_dtype(dtype))
            .map_err(failed("preparing pixels"))
    }
}

/// 8-bit values of any shape to float32 in -1 to 1: divided by 127.5, then less 1, as the reference rounds.
///
/// # Errors
/// A failure of the device.
pub fn normalise(bytes: &Tensor) -> candle_core::Result<Tensor> {
    let divisor = Tensor::new(127.5f32, bytes.device())?;
    let one = Tensor::new(1f32, bytes.device())?;
    bytes.to_dtype(DType::F32)?.broadcast_div(&divisor)?.broadcast_sub(&one)
}

fn decode(bytes: &[u8], path: &Path) -> Result<DynamicImage> {
    let unreadable = |e: &dyn std::fmt::Display| {
        Error::data("the image cannot be read").at(path).expected("a jpeg, png or webp image").cause(e).advice("repair or remove the file")
    };
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| unreadable(&e))?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(SIDE_MAX);
    limits.max_image_height = Some(SIDE_MAX);
    limits.max_alloc = Some(DECODE_BYTES_MAX);
    reader.limits(limits);
    if reader.format() == Some(ImageFormat::Jpeg) && !has_jpeg_end(bytes) {
        return Err(unreadable(&"the file ends before its image does"));
    }
    let mut decoder = reader.into_decoder().map_err(|e| unreadable(&e))?;
    let orientation = decoder.orientation().map_err(|e| unreadable(&e))?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| unreadable(&e))?;
    image.apply_orientation(orientation);
    if image.width() == 0 || image.height() == 0 {
        return Err(unreadable(&"it has no pixels"));
    }
    Ok(image)
}

/// Whether a JPEG file has an end-of-image marker behind the first scan. Decoders fill what is missing with grey; half a download must not be trained on.
fn has_jpeg_end(bytes: &[u8]) -> bool {
    // Segments of known length up to the first scan: a thumbnail in one of them has an end of its own.
    let mut at = 2;
    while let Some([0xff, marker, high, low]) = bytes.get(at..at + 4) {
        match marker {
            0xff => at += 1,
            0x01 | 0xd0..=0xd8 => at += 2,
            0xd9 => return true,
            0xda => break,
            _ => at += 2 + usize::from(u16::from_be_bytes([*high, *low])),
        }
    }
    bytes.get(at..).unwrap_or_default().windows(2).any(|pair| pair == [0xff, 0xd9])
}

/// The size that covers a square of `side`: the shorter side becomes `side`, the longer one is rounded down (torchvision's `Resize`).
fn cover(width: u32, height: u32, side: u32) -> (u32, u32) {
    let long = |long: u32, short: u32| (u64::from(side) * u64::from(long) / u64::from(short)).min(u64::from(u32::MAX)) as u32;
    if width <= height { (side, long(height, width)) } else { (long(width, height), side) }
}

/// Where a centre crop starts: half of what is left over, halves rounded to even (torchvision's `CenterCrop`).
fn crop_start(length: usize, side: usize) -> usize {
    let over = length - side;
    over / 2 + usize::from(over % 4 == 3)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn sizes_follow_torchvision() {
        assert_eq!(cover(640, 427, 512), (767, 512));
        assert_eq!(cover(427, 640, 512), (512, 767));
        assert_eq!(cover(3, 3, 128), (128, 128));
        // int(round((length - side) / 2)) with halves to even.
        assert_eq!([0, 1, 2, 3, 4, 5, 7].map(|over| crop_start(16 + over, 16)), [0, 0, 1, 2, 2, 2, 4]);
    }

    /// The image of `tests/fixtures/pillow.py`.
    fn synthetic(width: u32, height: u32) -> image::RgbImage {
        image::RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 7 + y * 3) as u8, (x * x + y) as u8, (x * y * 5) as u8]))
    }

    fn png(image: &DynamicImage, orientation: u8) -> Vec<u8> {
        use image::ImageEncoder;
        let mut bytes = Vec::new();
        let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        // A little-endian TIFF with one entry: tag 0x0112, type SHORT, count 1.
        let exif = [b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".as_slice(), &[orientation, 0, 0, 0], &[0; 4]].concat();
        encoder.set_exif_metadata(exif).unwrap();
        image.write_with_encoder(encoder).unwrap();
        bytes
    }

    #[test]
    fn half_a_jpeg_is_refused() {
        let image = DynamicImage::ImageRgb8(synthetic(300, 200));
        let mut whole = Vec::new();
        image.write_to(&mut Cursor::new(&mut whole), ImageFormat::Jpeg).unwrap();
        // A thumbnail that is a whole JPEG, in front.
        let mut small = Vec::new();
        DynamicImage::ImageRgb8(synthetic(8, 8)).write_to(&mut Cursor::new(&mut small), ImageFormat::Jpeg).unwrap();
        let length = u16::try_from(small.len() + 2).unwrap().to_be_bytes();
        let with_thumbnail = [&whole[..2], &[0xff, 0xe2], &length, &small, &whole[2..]].concat();
        for file in [&whole, &with_thumbnail] {
            Pixels::prepare(file, Path::new("a.jpg"), 64).unwrap();
            // Something behind the end does not matter.
            Pixels::prepare(&[file.as_slice(), b"more"].concat(), Path::new("a.jpg"), 64).unwrap();
            for part in [30, 60, 90] {
                let half = &file[..file.len() * part / 100];
                assert_eq!(Pixels::prepare(half, Path::new("a.jpg"), 64).unwrap_err().exit_code(), 65, "{part} %");
            }
            assert_eq!(Pixels::prepare(&file[..file.len() - 2], Path::new("a.jpg"), 64).unwrap_err().exit_code(), 65);
        }
    }

    #[test]
    fn an_image_like_a_thread_is_refused_by_name() {
        let thread = DynamicImage::ImageRgb8(image::RgbImage::new(60_000, 1));
        let error = Pixels::prepare(&png(&thread, 1), Path::new("thread.png"), 1024).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        assert!(["thread.png", "60000 x 1"].iter().all(|part| error.to_string().contains(part)), "{error}");
    }

    #[test]
    fn pixels_are_pillows_and_sizes_torchvisions() {
        let cases: [(u32, u32, u32, &[u8]); 2] = [
            (37, 23, 16, include_bytes!("../tests/fixtures/pillow-37x23-to-16.rgb")),
            (20, 24, 32, include_bytes!("../tests/fixtures/pillow-20x24-to-32.rgb")),
        ];
        for (width, height, side, expected) in cases {
            let bytes = png(&synthetic(width, height).into(), 1);
            let pixels = Pixels::prepare(&bytes, Path::new("a.png"), side).unwrap();
            assert_eq!((pixels.width, pixels.height), (side as usize, side as usize));
            assert_eq!(pixels.rgb.len(), expected.len());
            // Both round to 8 bits between the two passes, with coefficients of different precision: one level of 255, now and then.
            let off = pixels.rgb.iter().zip(expected).map(|(a, b)| a.abs_diff(*b));
            let count = off.clone().filter(|d| *d > 0).count();
            assert!(off.clone().all(|d| d <= 1) && count < expected.len() / 10, "{width} x {height}: {count}");
        }
    }

    #[test]
    fn orientation_is_applied_and_alpha_dropped() {
        let upright = synthetic(16, 16);
        let stored = |orientation: u8| -> image::RgbImage {
            use image::imageops as ops;
            // What a camera stores so that the viewer's correction gives `upright` back (EXIF 2.3, 4.6.4).
            match orientation {
                2 => ops::flip_horizontal(&upright),
                3 => ops::rotate180(&upright),
                4 => ops::flip_vertical(&upright),
                5 => ops::flip_horizontal(&ops::rotate90(&upright)),
                6 => ops::rotate270(&upright),
                7 => ops::flip_horizontal(&ops::rotate270(&upright)),
                8 => ops::rotate90(&upright),
                _ => upright.clone(),
            }
        };
        for orientation in 1..=8 {
            let pixels = Pixels::prepare(&png(&stored(orientation).into(), orientation), Path::new("a.png"), 16).unwrap();
            assert_eq!(&pixels.rgb, upright.as_raw(), "orientation {orientation}");
        }
        let veiled = image::RgbaImage::from_fn(16, 16, |x, y| {
            let image::Rgb([r, g, b]) = *upright.get_pixel(x, y);
            image::Rgba([r, g, b, (x * 16) as u8])
        });
        let pixels = Pixels::prepare(&png(&veiled.into(), 1), Path::new("a.png"), 16).unwrap();
        assert_eq!(&pixels.rgb, upright.as_raw(), "an alpha channel is dropped, not blended");
    }

    #[test]
    fn every_format_is_read_whatever_its_name() {
        let image = DynamicImage::from(synthetic(64, 48));
        for format in [image::ImageFormat::Jpeg, image::ImageFormat::Png, image::ImageFormat::WebP] {
            let mut bytes = Vec::new();
            image.write_to(&mut Cursor::new(&mut bytes), format).unwrap();
            assert_eq!(Pixels::prepare(&bytes, Path::new("no.ending"), 48).unwrap().rgb.len(), 48 * 48 * 3, "{format:?}");
        }
    }

    #[test]
    fn what_is_no_image_is_named() {
        for bytes in [&b""[..], b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"] {
            let error = Pixels::prepare(bytes, Path::new("folder/broken.jpg"), 16).unwrap_err();
            assert_eq!(error.exit_code(), 65);
            assert!(error.to_string().contains("folder/broken.jpg"), "{error}");
        }
    }
}
