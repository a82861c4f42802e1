//! Frozen matrices in the activations' type: a ring of device memory that INT8 rows are dequantised into, ahead of the products.
//!
//! A matrix that fits is brought over and multiplied whole, and stays until the ring comes round: the input gradient of a visit finds what its recompute
//! used, and further micro-batches what the first did. One that does not fit comes and is multiplied piece by piece. Either way products are made by
//! the algorithm that is chosen for the whole matrix, so that the ring's size changes no result.
//!
//! Dequantisation may run on a stream of its own ([`serenity_cuda::Side`]). The host is a long way ahead of the device, so that stream works on
//! later matrices, of later visits too, as soon as their memory is free: it waits for the last product that read what it overwrites, and a
//! product waits for the pieces that it reads. What a matrix's address holds may change between visits: nothing is found again after
//! [`Tiles::begin_visit`].
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;

use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::ops::rows::Int8Rows;
use serenity_cuda::{Event, Gpu, Mat, Ptr, Side, Stream, Ty};
use serenity_protocol::{Error, Result};

use super::clock::Phase;
use super::linear::{Context, Weight};

/// Rows or columns of a piece are a multiple of this.
const STEP: usize = 256;

/// Ranges that cut `count` rows of `width` elements (or the other way round) into equal pieces of at most about `largest` elements.
pub fn pieces(count: usize, width: usize, largest: usize) -> impl Iterator<Item = Range<usize>> {
    let number = (count * width).div_ceil(largest.max(1)).max(1);
    let size = count.div_ceil(number).next_multiple_of(STEP).min(count.max(1));
    (0..count).step_by(size).map(move |first| first..(first + size).min(count))
}

/// Elements of the largest piece that a matrix is cut into, by rows or by columns.
#[must_use]
pub fn largest_piece(out: usize, inner: usize, largest: usize) -> usize {
    let of = |count, width| pieces(count, width, largest).map(|p| p.len() * width).max().unwrap_or(0);
    of(out, inner).max(of(inner, out))
}

/// Rows and columns of a part of a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Rows.
    pub rows: Range<usize>,
    /// Columns.
    pub cols: Range<usize>,
}

/// A matrix of an adapter beside a frozen one, so that one product takes both.
#[derive(Debug, Clone, Copy)]
pub enum Beside {
    /// B, `[out, r]`, behind the last column.
    Behind(Mat),
    /// A, `[r, in]`, below the last row.
    Below(Mat),
}

/// Columns behind and rows below a part of a frozen matrix in the ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Margin {
    behind: usize,
    below: usize,
}

impl Margin {
    fn of(beside: Option<Beside>) -> Self {
        match beside {
            None => Self::default(),
            Some(Beside::Behind(b)) => Self { behind: b.cols, below: 0 },
            Some(Beside::Below(a)) => Self { behind: 0, below: a.rows },
        }
    }

    /// What of it stands beside a part of a matrix `[out, inner]`: only what is at its edge.
    fn at(self, part: &Part, (out, inner): (usize, usize)) -> Self {
        let there = |end: usize, edge: usize, margin: usize| if end == edge { margin } else { 0 };
        Self { behind: there(part.cols.end, inner, self.behind), below: there(part.rows.end, out, self.below) }
    }

    /// Bytes of so many rows and columns with it.
    fn bytes(self, (rows, cols): (usize, usize), ty: Ty) -> usize {
        (rows + self.below) * self.stride(cols) * ty.bytes()
    }

    /// Elements from one row to the next: rows with something behind them start at multiples of 16 bytes.
    fn stride(self, cols: usize) -> usize {
        if self.behind == 0 { cols } else { (cols + self.behind).next_multiple_of(8) }
    }
}

/// Rows of an entry that are dequantised at once.
#[derive(Debug)]
struct Piece {
    rows: Range<usize>,
    /// Behind their dequantisation, until the compute stream has waited for it.
    ready: Option<Event>,
    /// Whether the columns behind them are there.
    behind: bool,
}

/// What an entry holds.
#[derive(Debug)]
struct Held {
    /// Where the matrix comes from, and which part of it this is.
    from: Ptr,
    part: Part,
    /// What there is room for beside the part.
    margin: Margin,
    /// Whether it may be found: it is of this visit.
    current: bool,
}

impl Held {
    /// Whether a part of the matrix at `from` is here, with room for what stands beside it there.
    fn holds(&self, from: Ptr, part: &Part, margin: Margin) -> bool {
        let inside = |inner: &Range<usize>, outer: &Range<usize>| outer.start <= inner.start && inner.end <= outer.end;
        let room = self.margin.behind >= margin.behind && self.margin.below >= margin.below;
        self.current && self.from == from && room && inside(&part.rows, &self.part.rows) && inside(&part.cols, &self.part.cols)
    }
}

/// A part of the ring's memory that holds a part of a matrix.
#[derive(Debug)]
struct Entry {
    held: Held,
    /// Whether the rows below are there.
    below: bool,
    place: Range<usize>,
    mat: Mat,
    pieces: Vec<Piece>,
    /// Recorded on the compute stream behind the last product that read it.
    used: Event,
}

#[derive(Debug, Default)]
struct State {
    entries: Vec<Entry>,
    /// Where the next entry goes.
    next: usize,
    idle: Vec<Event>,
}

/// The ring.
#[derive(Debug)]
pub struct Tiles {
    base: Ptr,
    bytes: usize,
    state: RefCell<State>,
}

impl Tiles {
    /// Over `bytes` bytes at `base`, which must be a multiple of [`ALIGNMENT`].
    #[must_use]
    pub fn new(base: Ptr, bytes: usize) -> Self {
        Self { base, bytes, state: RefCell::default() }
    }

    /// What matrices were at their addresses may change from here on.
    pub fn begin_visit(&self) {
        self.state.borrow_mut().entries.iter_mut().for_each(|e| e.held.current = false);
    }

    /// Forgets everything; all work must have ended.
    pub fn clear(&self) {
        *self.state.borrow_mut() = State::default();
    }

    /// Whether a matrix with so much beside it is brought over whole.
    fn fits(&self, c: &Context<'_>, weight: &Weight, margin: Margin) -> bool {
        c.gpu.tuning().keep && margin.bytes(weight.shape(), c.ty) <= self.bytes
    }

    /// The ranges of rows in which products see a matrix.
    pub fn by_rows(&self, c: &Context<'_>, weight: &Weight, beside: Option<Beside>) -> impl Iterator<Item = Range<usize>> {
        let (out, inner) = weight.shape();
        pieces(out, inner, self.largest(c, weight, beside))
    }

    /// The ranges of columns in which products see a matrix.
    pub fn by_columns(&self, c: &Context<'_>, weight: &Weight, beside: Option<Beside>) -> impl Iterator<Item = Range<usize>> {
        let (out, inner) = weight.shape();
        pieces(inner, out, self.largest(c, weight, beside))
    }

    fn largest(&self, c: &Context<'_>, weight: &Weight, beside: Option<Beside>) -> usize {
        if self.fits(c, weight, Margin::of(beside)) { usize::MAX } else { c.gpu.tuning().piece }
    }

    /// Queues `product` with a part of `weight` in the activations' type: one of the pieces that it is cut into by rows or by columns, with what
    /// stands `beside` it there. Where nothing does, `room` is left for what another product of this visit wants there.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the part is larger than the ring; those of `product`.
    pub fn with(
        &self,
        c: &Context<'_>,
        weight: &Weight,
        (beside, room): (Option<Beside>, Option<Beside>),
        part: &Part,
        product: impl FnOnce(Mat) -> Result<()>,
    ) -> Result<()> {
        if let (Weight::Dense(mat), None) = (weight, beside)
            && mat.ty == c.ty
        {
            return product(view(*mat, part)?);
        }
        let margin = Margin::of(beside).at(part, weight.shape());
        let mut state = self.state.borrow_mut();
        let index = match state.entries.iter().position(|e| e.held.holds(weight.address(), part, margin)) {
            Some(index) => index,
            None => self.bring(&mut state, c, weight, Margin::of(beside.or(room)), part)?,
        };
        let State { entries, idle, .. } = &mut *state;
        let entry = entries.get_mut(index).ok_or_else(|| Error::invariant("a dequantised matrix is not there"))?;
        let all = entry.held.part.clone();
        let rows = part.rows.start - all.rows.start..part.rows.end - all.rows.start;
        let cols = part.cols.start - all.cols.start..part.cols.end - all.cols.start;
        for piece in entry.pieces.iter_mut().filter(|p| p.rows.start < rows.end && rows.start < p.rows.end) {
            if let Some(event) = piece.ready.take() {
                c.time(Phase::Tile, || c.gpu.compute().wait(&event))?;
                idle.push(event);
            }
            // Adapters here and not on the side: they change between steps, on this stream.
            if let Some(Beside::Behind(b)) = beside.filter(|_| margin.behind > 0 && !piece.behind) {
                let to = entry.mat.rows(piece.rows.start, piece.rows.len())?.columns(all.cols.len(), b.cols)?;
                let from = b.rows(all.rows.start + piece.rows.start, piece.rows.len())?;
                c.pass(|gpu| gpu.cast(to, from))?;
                piece.behind = true;
            }
        }
        if let Some(Beside::Below(a)) = beside.filter(|_| margin.below > 0 && !entry.below) {
            let to = entry.mat.rows(all.rows.len(), a.rows)?.columns(0, all.cols.len())?;
            c.pass(|gpu| gpu.cast(to, a.columns(all.cols.start, all.cols.len())?))?;
            entry.below = true;
        }
        let seen = Part { rows: rows.start..rows.end + margin.below, cols: cols.start..cols.end + margin.behind };
        product(view(entry.mat, &seen)?)?;
        if c.gpu.tuning().side == Side::Off { Ok(()) } else { c.gpu.compute().record(&entry.used) }
    }

    /// Makes an entry for a part, or for the whole matrix where that fits, with room for what stands beside it, and queues its dequantisation.
    fn bring(&self, state: &mut State, c: &Context<'_>, weight: &Weight, margin: Margin, part: &Part) -> Result<usize> {
        let (out, inner) = weight.shape();
        let tuning = c.gpu.tuning();
        let whole = Part { rows: 0..out, cols: 0..inner };
        let part = if self.fits(c, weight, margin) { &whole } else { part };
        let margin = margin.at(part, (out, inner));
        let (rows, cols) = (part.rows.len(), part.cols.len());
        let place = state.place(self.bytes, margin.bytes((rows, cols), c.ty))?;
        self.make_room(state, c.gpu, &place)?;
        let dense = Mat::new(self.base.offset(place.start), c.ty, rows + margin.below, cols + margin.behind);
        let mat = Mat { stride: margin.stride(cols), ..dense };
        let side = c.gpu.side();
        let mut event = || state.idle.pop().map_or_else(|| Event::new(c.gpu.context()), Ok);
        let mut ready = Vec::new();
        // Beside products the first rows are wanted early.
        for rows in pieces(rows, cols, if tuning.side == Side::Off { usize::MAX } else { tuning.piece }) {
            let from = Part { rows: part.rows.start + rows.start..part.rows.start + rows.end, cols: part.cols.clone() };
            let to = mat.rows(rows.start, rows.len())?.columns(0, cols)?;
            c.clock.on(c.gpu, side, Phase::Dequantise, || convert(c.gpu, side, tuning.blocks, to, weight, &from))?;
            let done = if tuning.side == Side::Off { None } else { Some(event()?) };
            if let Some(done) = &done {
                side.record(done)?;
            }
            ready.push(Piece { rows, ready: done, behind: false });
        }
        let used = event()?;
        let held = Held { from: weight.address(), part: part.clone(), margin, current: true };
        state.entries.push(Entry { held, below: false, place, mat, pieces: ready, used });
        Ok(state.entries.len() - 1)
    }

    /// Drops the entries that lie at `place`; what is written there next waits for their last use.
    fn make_room(&self, state: &mut State, gpu: &Gpu, place: &Range<usize>) -> Result<()> {
        let mut kept = Vec::with_capacity(state.entries.len() + 1);
        for entry in state.entries.drain(..) {
            if entry.place.end <= place.start || place.end <= entry.place.start {
                kept.push(entry);
                continue;
            }
            if gpu.tuning().side != Side::Off {
                gpu.side().wait(&entry.used)?;
            }
            state.idle.push(entry.used);
            state.idle.extend(entry.pieces.into_iter().filter_map(|piece| piece.ready));
        }
        state.entries = kept;
        state.next = place.end.next_multiple_of(ALIGNMENT);
        Ok(())
    }
}

impl State {
    /// Where the next `bytes` bytes of `all` go.
    fn place(&self, all: usize, bytes: usize) -> Result<Range<usize>> {
        if bytes > all {
            return Err(Error::invariant("the memory for dequantised matrices is too small").expected(bytes).found(all));
        }
        let first = if self.next + bytes <= all { self.next } else { 0 };
        Ok(first..first + bytes)
    }
}

fn view(mat: Mat, part: &Part) -> Result<Mat> {
    mat.rows(part.rows.start, part.rows.len())?.columns(part.cols.start, part.cols.len())
}

/// Queues bringing a part of `weight` into `to` on `stream`.
fn convert(gpu: &Gpu, stream: &Stream, blocks: u32, to: Mat, weight: &Weight, part: &Part) -> Result<()> {
    match *weight {
        Weight::Dense(mat) => gpu.cast_on(stream, to, view(mat, part)?),
        Weight::Int8(codes, _) => {
            let from = Int8Rows {
                codes: codes.codes.offset(part.rows.start * codes.padded + part.cols.start),
                scales: codes.scales.offset(4 * part.rows.start),
                rows: part.rows.len(),
                padded: codes.padded,
            };
            gpu.dequant_rows_on(stream, blocks, to, from)
        }
    }
}

/// Sensible sizes of a ring for blocks of matrices of `shapes` (`(out, in)`, one list a block) with adapters of a `rank` beside them, smallest
/// first: for one piece; for the smallest block, so that nothing comes twice in a visit; and for two, so that the next visit's can come
/// meanwhile.
#[must_use]
pub fn ring_bytes(blocks: &[Vec<(usize, usize)>], ty: Ty, largest: usize, rank: usize) -> Vec<usize> {
    let margin = |(out, inner): &(usize, usize)| out.max(inner) * (rank.next_multiple_of(8) + 8);
    let piece = |shape: &(usize, usize)| largest_piece(shape.0, shape.1, largest) + margin(shape);
    let least = blocks.iter().flatten().map(piece).max().unwrap_or(0) * ty.bytes() + ALIGNMENT;
    let matrix = |shape: &(usize, usize)| ((shape.0 * shape.1 + margin(shape)) * ty.bytes()).next_multiple_of(ALIGNMENT);
    let small = blocks.iter().map(|b| b.iter().map(matrix).sum::<usize>()).min().unwrap_or(0);
    let mut sizes = vec![least, small.max(least), (2 * small).max(least)];
    sizes.dedup();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGEST: usize = 1 << 27;

    #[test]
    fn pieces_cover_and_stay_small() {
        for (count, width) in [(55_296, 6144), (6144, 55_296), (6144, 24_576), (24_576, 6144), (1, 1), (257, 100), (36, 1 << 27)] {
            let mut end = 0;
            for piece in pieces(count, width, LARGEST) {
                assert!(piece.start == end && !piece.is_empty());
                assert!(piece.len() <= STEP || piece.len() * width <= LARGEST + STEP * width, "{piece:?} x {width}");
                end = piece.end;
            }
            assert_eq!(end, count);
        }
        assert_eq!(pieces(6144, 6144, LARGEST).count(), 1);
        assert_eq!(pieces(55_296, 6144, LARGEST).count(), 3);
    }

    #[test]
    fn the_ring_wraps_where_the_end_is_too_near() {
        let mut state = State::default();
        assert!(matches!(state.place(1000, 600), Ok(place) if place == (0..600)));
        state.next = 600;
        assert!(matches!(state.place(1000, 400), Ok(place) if place == (600..1000)));
        assert!(matches!(state.place(1000, 401), Ok(place) if place == (0..401)));
        assert!(state.place(1000, 1001).is_err());
    }

    #[test]
    fn what_stands_beside_a_part_is_found_with_it_alone() {
        let mat = Mat::new(Ptr::NULL, Ty::Bf16, 8, 40);
        assert_eq!(Margin::of(None), Margin::default());
        let (behind, below) = (Margin::of(Some(Beside::Behind(mat))), Margin::of(Some(Beside::Below(mat))));
        assert_eq!((behind, below), (Margin { behind: 40, below: 0 }, Margin { behind: 0, below: 8 }));
        let part = |rows: Range<usize>, cols: Range<usize>| Part { rows, cols };
        let shape = (100, 40);
        assert_eq!(behind.at(&part(0..100, 0..20), shape), Margin::default());
        assert_eq!(behind.at(&part(10..20, 20..40), shape), behind);
        assert_eq!(below.at(&part(0..90, 0..40), shape), Margin::default());
        assert_eq!(below.at(&part(0..100, 0..20), shape), below);
        let find = |margin: Margin, of: Part, current: bool, wanted: &Part, with: Margin| {
            let from = Ptr::NULL.offset(256);
            let held = Held { from, part: of, margin, current };
            held.holds(from, wanted, with) && !held.holds(Ptr::NULL, wanted, with)
        };
        let (whole, left, right) = (part(0..100, 0..40), part(0..100, 0..20), part(0..100, 20..40));
        for (margin, of, current, wanted, with, found) in [
            (Margin::default(), &whole, true, &left, Margin::default(), true),
            (Margin::default(), &whole, true, &left, below, false),
            (below, &whole, true, &left, below, true),
            (below, &whole, true, &right, Margin::default(), true),
            (below, &whole, true, &right, behind, false),
            (behind, &whole, true, &right, behind, true),
            (below, &left, true, &right, Margin::default(), false),
            (below, &whole, false, &whole, below, false),
        ] {
            assert_eq!(find(margin, of.clone(), current, wanted, with), found, "{margin:?} {of:?} {wanted:?} {with:?}");
        }
    }

    #[test]
    fn the_ring_holds_a_large_piece_at_least_and_two_small_blocks_at_most() {
        let blocks = vec![vec![(55_296, 6144), (6144, 24_576)], vec![(6144, 6144); 3]];
        let sizes = ring_bytes(&blocks, Ty::Bf16, LARGEST, 16);
        let block = (55_296 * (6144 + 24) + 6144 * (24_576 + 24)) * 2;
        assert!((18_432 * 6144 * 2..2 * LARGEST * 2).contains(&sizes[0]));
        assert!(sizes.windows(2).all(|pair| pair[0] < pair[1]) && sizes.iter().all(|bytes| *bytes <= 2 * block));
    }
}
