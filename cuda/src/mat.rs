//! Row-major matrix views of device memory. They own nothing and are copied freely; shapes are checked where they are used.
#![forbid(unsafe_code)]

use serenity_protocol::{Error, Result};

use crate::driver::Ptr;

/// Type of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ty {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
}

impl Ty {
    /// Bytes of an element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Ty::F32 => 4,
            Ty::Bf16 => 2,
        }
    }

    /// Elements in 16 bytes, the widest access.
    #[must_use]
    pub fn lanes(self) -> usize {
        16 / self.bytes()
    }

    /// As it ends the names of kernels.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Ty::F32 => "f32",
            Ty::Bf16 => "bf16",
        }
    }
}

/// `rows` x `cols` elements, rows `stride` elements apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mat {
    /// The first element.
    pub ptr: Ptr,
    /// Type of the elements.
    pub ty: Ty,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next, at least `cols`.
    pub stride: usize,
}

impl Mat {
    /// A dense matrix at `ptr`.
    #[must_use]
    pub fn new(ptr: Ptr, ty: Ty, rows: usize, cols: usize) -> Self {
        Self { ptr, ty, rows, cols, stride: cols }
    }

    /// The view of `cols` columns from `first` on.
    ///
    /// # Errors
    /// [`Error::Invariant`] beyond the last column.
    pub fn columns(self, first: usize, cols: usize) -> Result<Self> {
        if first.checked_add(cols).is_none_or(|end| end > self.cols) {
            return Err(self.wrong(&format!("columns {first}..+{cols}")));
        }
        Ok(Self { ptr: self.ptr.offset(first * self.ty.bytes()), cols, ..self })
    }

    /// The view of `rows` rows from `first` on.
    ///
    /// # Errors
    /// [`Error::Invariant`] beyond the last row.
    pub fn rows(self, first: usize, rows: usize) -> Result<Self> {
        if first.checked_add(rows).is_none_or(|end| end > self.rows) {
            return Err(self.wrong(&format!("rows {first}..+{rows}")));
        }
        Ok(Self { ptr: self.ptr.offset(first * self.stride * self.ty.bytes()), rows, ..self })
    }

    /// The same memory of a dense matrix in another shape.
    ///
    /// # Errors
    /// [`Error::Invariant`] if it is not dense or the number of elements differs.
    pub fn reshape(self, rows: usize, cols: usize) -> Result<Self> {
        if self.stride != self.cols || rows.checked_mul(cols) != Some(self.rows * self.cols) {
            return Err(self.wrong(&format!("the shape {rows} x {cols}")));
        }
        Ok(Self { rows, cols, stride: cols, ..self })
    }

    fn wrong(self, what: &str) -> Error {
        Error::invariant(format!("a matrix has not {what}")).found(self.describe())
    }

    /// Shape for messages.
    #[must_use]
    pub fn describe(self) -> String {
        format!("{} {} x {} (stride {})", self.ty.name(), self.rows, self.cols, self.stride)
    }

    /// Elements.
    #[must_use]
    pub fn len(self) -> usize {
        self.rows * self.cols
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    /// Bytes from the first element to the end of the last.
    #[must_use]
    pub fn span(self) -> usize {
        if self.is_empty() { 0 } else { ((self.rows - 1) * self.stride + self.cols) * self.ty.bytes() }
    }

    /// Whether every row starts at a multiple of 16 bytes and is made of groups of `lanes` elements.
    #[must_use]
    pub fn wide(self, lanes: usize) -> bool {
        self.ptr.address().is_multiple_of(16)
            && (self.rows <= 1 || (self.stride * self.ty.bytes()).is_multiple_of(16))
            && self.cols.is_multiple_of(lanes)
    }

    /// Checks shape and type.
    ///
    /// # Errors
    /// [`Error::Invariant`] naming `what`.
    pub fn expect_shape(self, what: &str, ty: Ty, rows: usize, cols: usize) -> Result<()> {
        if self.ty == ty && self.rows == rows && self.cols == cols && (self.stride >= cols || rows <= 1) {
            return Ok(());
        }
        Err(Error::invariant(format!("{what} has a wrong shape")).expected(format!("{} {rows} x {cols}", ty.name())).found(self.describe()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn views_address_what_they_name() {
        let m = Mat::new(Ptr::NULL.offset(4096), Ty::Bf16, 10, 24);
        let v = m.columns(8, 16).unwrap().rows(3, 7).unwrap();
        assert_eq!(v.ptr.address(), 4096 + (3 * 24 + 8) * 2);
        assert_eq!((v.rows, v.cols, v.stride), (7, 16, 24));
        assert_eq!(v.span(), (6 * 24 + 16) * 2);
        assert!(m.columns(9, 16).is_err() && m.rows(4, 7).is_err() && m.columns(usize::MAX, 2).is_err());
        assert!(v.reshape(16, 7).is_err(), "a view is not dense");
        assert_eq!(m.reshape(5, 48).unwrap().stride, 48);
        assert!(m.expect_shape("m", Ty::F32, 10, 24).is_err() && m.expect_shape("m", Ty::Bf16, 10, 24).is_ok());
    }

    #[test]
    fn wide_access_needs_aligned_rows_of_whole_groups() {
        let m = Mat::new(Ptr::NULL.offset(256), Ty::Bf16, 3, 24);
        assert!(m.wide(8));
        assert!(!m.columns(4, 8).unwrap().wide(8), "starts at 8 bytes");
        assert!(!m.columns(8, 12).unwrap().wide(8), "half a group at the end");
        assert!(!Mat::new(m.ptr, Ty::Bf16, 2, 20).wide(4), "rows of 40 bytes");
        assert!(Mat::new(m.ptr, Ty::Bf16, 1, 20).wide(4), "one row has no next");
        assert!(!Mat::new(m.ptr, Ty::F32, 4, 6).wide(4));
    }
}
