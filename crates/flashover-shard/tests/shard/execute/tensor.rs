//! Local tensors of f64 as plain data.

/// Row-major; `positions` are those of the tokens along `L` or `M`, for keys and values.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
    pub positions: Vec<usize>,
}

impl Tensor {
    pub fn zeros(shape: &[usize]) -> Self {
        Tensor { shape: shape.to_vec(), data: vec![0.0; shape.iter().product()], positions: Vec::new() }
    }

    /// Every element from its index.
    pub fn from_fn(shape: &[usize], mut f: impl FnMut(&[usize]) -> f64) -> Self {
        let mut tensor = Tensor::zeros(shape);
        let mut index = vec![0; shape.len()];
        for i in 0..tensor.data.len() {
            tensor.data[i] = f(&index);
            step(&mut index, shape);
        }
        tensor
    }

    pub fn offset(&self, index: &[usize]) -> usize {
        index.iter().zip(&self.shape).fold(0, |offset, (&i, &size)| {
            assert!(i < size, "{index:?} of {:?}", self.shape);
            offset * size + i
        })
    }

    pub fn at(&self, index: &[usize]) -> f64 {
        self.data[self.offset(index)]
    }

    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Tensor { data: self.data.iter().map(|&x| f(x)).collect(), ..self.clone() }
    }

    pub fn zip(&self, other: &Tensor, f: impl Fn(f64, f64) -> f64) -> Self {
        assert_eq!(self.shape, other.shape);
        let data = self.data.iter().zip(&other.data).map(|(&a, &b)| f(a, b)).collect();
        Tensor { data, ..self.clone() }
    }
}

/// The next index in row-major order.
pub fn step(index: &mut [usize], shape: &[usize]) {
    for (i, &size) in index.iter_mut().zip(shape).rev() {
        *i += 1;
        if *i < size {
            return;
        }
        *i = 0;
    }
}
