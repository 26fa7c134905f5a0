//! A borrowed tensor of four dimensions with any strides.

/// Read-only view of `[B, H, S, D]`-like data. Strides count elements and may be 0 (expanded) or negative (flipped).
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    offset: usize,
    shape: [usize; 4],
    strides: [isize; 4],
}

impl<'a, T> View<'a, T> {
    /// A view of `data` whose element `[0, 0, 0, 0]` is `data[offset]`.
    ///
    /// # Panics
    /// When an element of the view would lie outside `data`.
    pub fn new(data: &'a [T], offset: usize, shape: [usize; 4], strides: [isize; 4]) -> Self {
        if !shape.contains(&0) {
            let reach = |far: bool| {
                let side = shape.iter().zip(strides).map(|(&n, s)| (n as isize - 1) * s);
                offset as isize + side.filter(|&x| (x > 0) == far).sum::<isize>()
            };
            let (first, last) = (reach(false), reach(true));
            assert!(
                first >= 0 && last < data.len() as isize,
                "view: expected elements within 0..{}, got {first}..={last} (shape {shape:?}, strides {strides:?})",
                data.len()
            );
        }
        View { data, offset, shape, strides }
    }

    /// A contiguous view of all of `data`.
    #[cfg(test)]
    pub fn contiguous(data: &'a [T], shape: [usize; 4]) -> Self {
        let [_, h, s, d] = shape.map(|n| n as isize);
        View::new(data, 0, shape, [h * s * d, s * d, d, 1])
    }

    /// The sizes.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The view repeated to `shape`, without a copy: dimensions of size 1 get stride 0.
    ///
    /// # Panics
    /// When a dimension is neither 1 nor that of `shape`.
    pub fn broadcast(&self, shape: [usize; 4]) -> Self {
        let mut strides = self.strides;
        for ((stride, &from), to) in strides.iter_mut().zip(&self.shape).zip(shape) {
            assert!(
                from == to || from == 1,
                "view: expected a shape that broadcasts to {shape:?}, got {:?}",
                self.shape
            );
            if from == 1 {
                *stride = 0;
            }
        }
        View { shape, strides, ..*self }
    }

    /// Stride of dimension `axis`.
    pub(super) fn stride(&self, axis: usize) -> isize {
        self.strides[axis]
    }

    /// The whole storage behind the view.
    pub(super) fn data(&self) -> &'a [T] {
        self.data
    }

    /// Index of `[b, h, i, j]` in [`data`](Self::data). Signed: a row that starts outside the view's own elements
    /// (none of its columns is read then) may lie before the storage.
    #[inline(always)]
    pub(super) fn index(&self, b: usize, h: usize, i: usize, j: usize) -> isize {
        let [sb, sh, si, sj] = self.strides;
        self.offset as isize + b as isize * sb + h as isize * sh + i as isize * si + j as isize * sj
    }
}

impl<T: Copy> View<'_, T> {
    /// Element `[b, h, i, j]`.
    #[inline(always)]
    pub(super) fn at(&self, b: usize, h: usize, i: usize, j: usize) -> T {
        self.data[self.index(b, h, i, j) as usize]
    }
}
