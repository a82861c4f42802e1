//! The loss plot: training loss of each step, its running mean, and the validation loss, as a PNG.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::path::Path;

use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::ascii::{FONT_7X13, FONT_9X15_BOLD};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{Circle, Line, PrimitiveStyle};
use embedded_graphics::text::{Alignment, Text};
use image::{ImageFormat, Rgb, RgbImage};
use serenity_protocol::{Error, Result, atomic_file};

use crate::log::LogLine;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 560;
const LEFT: i32 = 84;
const RIGHT: i32 = WIDTH as i32 - 24;
const TOP: i32 = 44;
const BOTTOM: i32 = HEIGHT as i32 - 56;
const INK: Rgb888 = Rgb888::new(40, 40, 48);
const GRID: Rgb888 = Rgb888::new(228, 228, 232);
const TRAIN: Rgb888 = Rgb888::new(178, 200, 228);
const MEAN: Rgb888 = Rgb888::new(24, 90, 169);
const VALIDATION: Rgb888 = Rgb888::new(204, 68, 20);

/// Draws `lines` to `path` (atomic). An empty log gives empty axes.
///
/// # Errors
/// What writing the file reports.
pub fn write(path: &Path, title: &str, lines: &[LogLine]) -> Result<()> {
    let image = draw(title, lines);
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).map_err(|e| Error::invariant("the plot cannot be encoded").cause(e))?;
    atomic_file::write(path, bytes.get_ref())
}

/// A canvas that embedded-graphics draws on; points outside are dropped.
struct Canvas(RgbImage);

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.0.width(), self.0.height())
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;
    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(at, color) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y))
                && let Some(pixel) = self.0.get_pixel_mut_checked(x, y)
            {
                *pixel = Rgb([color.r(), color.g(), color.b()]);
            }
        }
        Ok(())
    }
}

/// Drawing on memory cannot fail: the error type has no values.
fn done<T>(result: Result<T, Infallible>) {
    let Ok(_) = result;
}

impl Canvas {
    fn line(&mut self, from: Point, to: Point, color: Rgb888, width: u32) {
        done(Line::new(from, to).into_styled(PrimitiveStyle::with_stroke(color, width)).draw(self));
    }

    fn dot(&mut self, at: Point, diameter: u32, color: Rgb888) {
        done(Circle::with_center(at, diameter).into_styled(PrimitiveStyle::with_fill(color)).draw(self));
    }

    fn text(&mut self, text: &str, at: Point, alignment: Alignment, color: Rgb888) {
        done(Text::with_alignment(text, at, MonoTextStyle::new(&FONT_7X13, color), alignment).draw(self));
    }

    fn curve(&mut self, points: &[Point], color: Rgb888, width: u32) {
        for pair in points.windows(2) {
            if let [a, b] = pair {
                self.line(*a, *b, color, width);
            }
        }
    }
}

/// A linear scale from values to pixels with round ticks.
struct Scale {
    low: f64,
    high: f64,
    tick: f64,
    from: i32,
    to: i32,
}

impl Scale {
    /// Covers `values` with about `ticks` intervals; pixels run from `from` (low) to `to` (high).
    fn new(values: impl Iterator<Item = f64>, ticks: f64, from: i32, to: i32) -> Self {
        let (mut low, mut high) = values.filter(|v| v.is_finite()).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        if high - low <= 1e-9 * high.abs().max(1e-9) {
            let pad = high.abs().max(1.0) * 0.1;
            (low, high) = (low - pad, high + pad);
        }
        let tick = round_tick((high - low) / ticks);
        Self { low: (low / tick).floor() * tick, high: (high / tick).ceil() * tick, tick, from, to }
    }

    fn at(&self, value: f64) -> i32 {
        let part = (value - self.low) / (self.high - self.low);
        self.from + (part * f64::from(self.to - self.from)).round() as i32
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        let count = ((self.high - self.low) / self.tick).round() as u32;
        (0..=count.min(50)).map(|i| self.low + f64::from(i) * self.tick)
    }

    fn label(&self, value: f64) -> String {
        let digits = (-self.tick.log10().floor()).clamp(0.0, 6.0) as usize;
        let value = if value.abs() < self.tick * 1e-6 { 0.0 } else { value };
        format!("{value:.digits$}")
    }
}

/// 1, 2 or 5 times a power of ten, at least `raw`.
fn round_tick(raw: f64) -> f64 {
    let power = 10f64.powf(raw.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|t| *t >= raw * 0.999).unwrap_or(10.0 * power)
}

/// Mean of up to `window` values before and at each point.
fn running_mean(values: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let mean_to = |i: usize| {
        let span = &values[(i + 1).saturating_sub(window)..=i];
        span.iter().map(|v| v.1).sum::<f64>() / span.len() as f64
    };
    values.iter().enumerate().map(|(i, v)| (v.0, mean_to(i))).collect()
}

fn draw(title: &str, lines: &[LogLine]) -> RgbImage {
    let pick = |field: fn(&LogLine) -> Option<f64>| -> Vec<(f64, f64)> {
        lines.iter().filter_map(|l| Some((l.step as f64, field(l).filter(|v| v.is_finite())?))).collect()
    };
    let (train, validation) = (pick(|l| l.loss), pick(|l| l.val_loss));
    // A tenth of the run, so that the mean follows the trend and not the noise level that a step happened to draw.
    let mean = running_mean(&train, (train.len() / 10).clamp(1, 100));
    let all = || train.iter().chain(&validation);
    let x = Scale::new(all().map(|p| p.0), 8.0, LEFT, RIGHT);
    let y = Scale::new(all().map(|p| p.1), 6.0, BOTTOM, TOP);
    let mut canvas = Canvas(RgbImage::from_pixel(WIDTH, HEIGHT, Rgb([255, 255, 255])));
    draw_axes(&mut canvas, &x, &y, title);
    let place = |points: &[(f64, f64)]| points.iter().map(|p| Point::new(x.at(p.0), y.at(p.1))).collect::<Vec<_>>();
    canvas.curve(&place(&train), TRAIN, 1);
    place(&train).into_iter().for_each(|p| canvas.dot(p, 3, TRAIN));
    canvas.curve(&place(&mean), MEAN, 3);
    canvas.curve(&place(&validation), VALIDATION, 1);
    place(&validation).into_iter().for_each(|p| canvas.dot(p, 9, VALIDATION));
    canvas.0
}

fn draw_axes(canvas: &mut Canvas, x: &Scale, y: &Scale, title: &str) {
    for tick in x.ticks() {
        let at = x.at(tick);
        canvas.line(Point::new(at, TOP), Point::new(at, BOTTOM), GRID, 1);
        canvas.line(Point::new(at, BOTTOM), Point::new(at, BOTTOM + 5), INK, 1);
        canvas.text(&x.label(tick), Point::new(at, BOTTOM + 19), Alignment::Center, INK);
    }
    for tick in y.ticks() {
        let at = y.at(tick);
        canvas.line(Point::new(LEFT, at), Point::new(RIGHT, at), GRID, 1);
        canvas.line(Point::new(LEFT - 5, at), Point::new(LEFT, at), INK, 1);
        canvas.text(&y.label(tick), Point::new(LEFT - 9, at + 4), Alignment::Right, INK);
    }
    canvas.line(Point::new(LEFT, TOP), Point::new(LEFT, BOTTOM), INK, 1);
    canvas.line(Point::new(LEFT, BOTTOM), Point::new(RIGHT, BOTTOM), INK, 1);
    canvas.text("step", Point::new((LEFT + RIGHT) / 2, HEIGHT as i32 - 14), Alignment::Center, INK);
    canvas.text("loss", Point::new(10, TOP - 10), Alignment::Left, INK);
    done(Text::new(title, Point::new(LEFT, 24), MonoTextStyle::new(&FONT_9X15_BOLD, INK)).draw(canvas));
    for (i, (name, color)) in [("training", TRAIN), ("running mean", MEAN), ("validation", VALIDATION)].into_iter().enumerate() {
        let left = RIGHT - 390 + 140 * i as i32;
        canvas.line(Point::new(left, 20), Point::new(left + 20, 20), color, 3);
        canvas.text(name, Point::new(left + 26, 24), Alignment::Left, INK);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn log(steps: u64) -> Vec<LogLine> {
        let loss = |s: u64| (s > 0).then(|| 1.0 / (s as f64).sqrt());
        (0..=steps)
            .map(|step| LogLine { step, loss: loss(step), val_loss: (step % 10 == 0).then_some(0.5), ..LogLine::default() })
            .collect()
    }

    fn count(image: &RgbImage, color: Rgb888) -> usize {
        image.pixels().filter(|p| p.0 == [color.r(), color.g(), color.b()]).count()
    }

    #[test]
    fn the_file_is_a_png_that_shows_every_series() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.png");
        write(&path, "tiny", &log(40)).unwrap();
        let image = image::open(&path).unwrap().to_rgb8();
        assert_eq!(image.dimensions(), (WIDTH, HEIGHT));
        for color in [INK, GRID, TRAIN, MEAN, VALIDATION] {
            assert!(count(&image, color) > 100, "{color:?}");
        }
        assert_ne!(draw("tiny", &log(40)), draw("tiny", &log(41)));
    }

    #[test]
    fn odd_logs_are_drawn() {
        let flat = vec![LogLine { step: 1, loss: Some(0.25), ..LogLine::default() }];
        let huge =
            vec![LogLine { step: 1, loss: Some(1e30), ..LogLine::default() }, LogLine { step: 2, loss: Some(1e-30), ..LogLine::default() }];
        for lines in [Vec::new(), flat, huge, log(1)] {
            assert!(count(&draw("x", &lines), INK) > 500);
        }
    }

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        for (low, high) in [(0.0, 1.0), (3.7, 912.0), (1e-4, 2e-4), (-5.0, 5.0)] {
            let scale = Scale::new([low, high].into_iter(), 6.0, 0, 100);
            let ticks: Vec<f64> = scale.ticks().collect();
            assert!((4..=9).contains(&ticks.len()), "{ticks:?}");
            assert!(scale.low <= low && scale.high >= high && scale.at(scale.low) == 0 && scale.at(scale.high) == 100);
        }
        assert_eq!(running_mean(&[(1.0, 2.0), (2.0, 4.0), (3.0, 9.0)], 2), [(1.0, 2.0), (2.0, 3.0), (3.0, 6.5)]);
    }
}
