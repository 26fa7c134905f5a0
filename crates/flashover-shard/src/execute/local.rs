//! Steps that read and write tensors of one rank only.

use burn::tensor::{Int, Tensor, TensorData, activation};

use super::{Rank, blocks, einsum};
use crate::architecture::{Nonlinearity, Norm};
use crate::error::ShardError;
use crate::program::{Op, TensorId};
use crate::spec::Dim;
use crate::transport::Transport;

/// What keeps a norm from dividing by zero.
pub(crate) const EPSILON: f32 = 1e-6;

/// `f(x)`.
pub(crate) fn nonlinearity<const D: usize>(f: Nonlinearity, x: Tensor<D>) -> Tensor<D> {
    match f {
        Nonlinearity::Silu => activation::silu(x),
        Nonlinearity::Gelu => activation::gelu(x),
        Nonlinearity::Relu => activation::relu(x),
    }
}

impl<T: Transport> Rank<'_, T> {
    pub(super) fn local(&mut self, op: &Op) -> Result<(), ShardError> {
        match op {
            Op::Embed { table, output, .. } => self.embed(*table, *output),
            Op::Select { input, output } => self.select(*input, *output),
            Op::Statistics { input, output } => {
                let x = self.get(*input)?;
                let squares = (x.clone() * x.clone()).sum_dim(2);
                let with_sums = self.pass.shapes[*output][2] > 1;
                let sums = if with_sums { Tensor::cat(vec![squares, x.sum_dim(2)], 2) } else { squares };
                self.put(*output, sums)
            }
            Op::Normalize { norm, input, statistics, scale, output } => {
                let [x, sums, scale] = [self.get(*input)?, self.get(*statistics)?, self.get(*scale)?];
                let scale = scale.permute([1, 2, 0, 3]);
                let normed = normalize(*norm, x, sums, self.pass.sizes.get(Dim::E));
                self.put(*output, normed * scale)
            }
            Op::Einsum { lhs, rhs, output } => {
                let [l, r, out] = [*lhs, *rhs, *output].map(|id| self.pass.dims(id));
                let made = einsum::einsum((self.get(*lhs)?, &l), (self.get(*rhs)?, &r), &out);
                self.put(*output, made)
            }
            Op::Split { input, output } => {
                self.owner[*output] = self.owner[*input];
                let x = self.get(*input)?;
                // A cache's copy keeps its tokens, however many they are.
                let part = if self.pass.spec(*input) == self.pass.spec(*output) {
                    x
                } else {
                    self.overlap(&x, (*input, self.rank), (*output, self.rank))?
                };
                self.put(*output, part)
            }
            Op::Rotary { input, output } => {
                let start = self.pass.past + self.pass.starts[*input][self.rank][1];
                let rotated = self.state.rotate(self.get(*input)?, start);
                self.put(*output, rotated)
            }
            Op::Activate { function, input, output } => {
                let x = nonlinearity(*function, self.get(*input)?);
                self.put(*output, x)
            }
            Op::Gate { function, gate, up, output } => {
                let x = nonlinearity(*function, self.get(*gate)?) * self.get(*up)?;
                self.put(*output, x)
            }
            Op::Add { lhs, rhs, output } => {
                let x = self.get(*lhs)? + self.get(*rhs)?;
                self.put(*output, x)
            }
            Op::Append { new, cache } => self.append(*new, *cache),
            Op::Attention { q, k, v, output, lse } => self.attention([*q, *k, *v, *output], *lse),
            Op::Merge { a, b, output } => self.merge(*a, *b, *output),
            Op::Rescale { o, lse, max, output, weight } => self.rescale([*o, *lse, *max], [*output, *weight]),
            Op::Divide { o, weight, output } => self.divide(*o, *weight, *output),
            Op::Collective { .. } | Op::Repeat { .. } => unreachable!("not local"),
        }
    }

    /// Rows of the table that the rank holds, zeros for the others.
    fn embed(&mut self, table: TensorId, output: TensorId) -> Result<(), ShardError> {
        let rows = self.get(table)?;
        let [held, width, ..] = rows.dims();
        let first = self.pass.starts[table][self.rank][0];
        let [batch, length, ..] = self.pass.shapes[output];
        let found = embed(rows.reshape([held, width]), first, self.pass.tokens.iter().flatten());
        self.put(output, found.reshape([batch, length, width, 1]))
    }

    /// The last `T` tokens, zeros where the rank does not hold them.
    fn select(&mut self, input: TensorId, output: TensorId) -> Result<(), ShardError> {
        let x = self.get(input)?;
        let shape = self.pass.shapes[output];
        let from = self.pass.starts[input][self.rank];
        let mut wanted = from;
        wanted[1] = self.pass.sizes.get(Dim::L) - self.pass.sizes.get(Dim::T);
        let zeros = |length: usize| Tensor::zeros([shape[0], length, shape[2], 1], (&self.device, x.dtype()));
        let selected = match blocks::overlap(&x, from, (wanted, shape)) {
            None => zeros(shape[1]),
            Some(part) => {
                let before = from[1].saturating_sub(wanted[1]);
                let after = shape[1] - before - part.dims()[1];
                let parts = [(before, None), (part.dims()[1], Some(part)), (after, None)];
                let parts = parts.into_iter().filter(|(length, _)| *length > 0);
                Tensor::cat(parts.map(|(length, part)| part.unwrap_or_else(|| zeros(length))).collect(), 1)
            }
        };
        self.put(output, selected)
    }
}

/// Rows of a table `[V, E]` that begins with token `first`, one for each token, zeros for tokens that it does not have.
pub(crate) fn embed<'a>(table: Tensor<2>, first: usize, tokens: impl Iterator<Item = &'a u32>) -> Tensor<2> {
    let held = table.dims()[0];
    let places: Vec<_> = tokens.map(|&token| (token as usize).checked_sub(first).filter(|&at| at < held)).collect();
    let (count, device) = (places.len(), table.device());
    let index: Vec<i32> = places.iter().map(|place| place.unwrap_or(0) as i32).collect();
    let mine: Vec<f32> = places.iter().map(|place| if place.is_some() { 1.0 } else { 0.0 }).collect();
    let index: Tensor<1, Int> = Tensor::from_data(TensorData::new(index, [count]), &device);
    let mine: Tensor<2> = Tensor::from_data(TensorData::new(mine, [count, 1]), (&device, table.dtype()));
    table.select(0, index) * mine
}

/// `[B, L, E, 1]` normed by its statistics `[B, L, S, 1]`, sums over all `width` elements of a row.
pub(crate) fn normalize(norm: Norm, x: Tensor<4>, sums: Tensor<4>, width: usize) -> Tensor<4> {
    let means = sums / width as f32;
    let squares = means.clone().narrow(2, 0, 1);
    match norm {
        Norm::Rms => x / (squares + EPSILON).sqrt(),
        Norm::Layer => {
            let mean = means.narrow(2, 1, 1);
            let variance = squares - mean.clone() * mean.clone();
            (x - mean) / (variance + EPSILON).sqrt()
        }
    }
}
