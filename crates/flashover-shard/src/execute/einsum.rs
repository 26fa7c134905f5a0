//! Products of two tensors over named dimensions, as one batched matrix product.

use burn::tensor::Tensor;

use super::padded;
use crate::spec::Dim;

/// `lhs` of dimensions `l` times `rhs` of dimensions `r`, summed over those that both have and `out` lacks.
pub(super) fn einsum((lhs, l): (Tensor<4>, &[Dim]), (rhs, r): (Tensor<4>, &[Dim]), out: &[Dim]) -> Tensor<4> {
    let of =
        |dims: &[Dim], keep: &dyn Fn(&Dim) -> bool| dims.iter().copied().filter(|dim| keep(dim)).collect::<Vec<_>>();
    let batch = of(l, &|dim| r.contains(dim) && out.contains(dim));
    let summed = of(l, &|dim| r.contains(dim) && !out.contains(dim));
    let rows = of(l, &|dim| !r.contains(dim));
    let columns = of(r, &|dim| !l.contains(dim));
    let (l_shape, r_shape) = (lhs.dims(), rhs.dims());
    let size = |dim: Dim| match l.iter().position(|&x| x == dim) {
        Some(at) => l_shape[at],
        None => r_shape[r.iter().position(|&x| x == dim).expect("a dimension of an operand")],
    };
    let count = |dims: &[Dim]| dims.iter().map(|&dim| size(dim)).product::<usize>();
    let [b, m, k, n] = [&batch, &rows, &summed, &columns].map(|dims| count(dims));
    let lhs = lhs.permute(order(l, &[&batch, &rows, &summed])).reshape([b, m, k]);
    let rhs = rhs.permute(order(r, &[&batch, &summed, &columns])).reshape([b, k, n]);
    let made = [&batch[..], &rows, &columns].concat();
    let shape: Vec<_> = made.iter().map(|&dim| size(dim)).collect();
    lhs.matmul(rhs).reshape(padded(&shape, 1)).permute(order(&made, &[out]))
}

/// The permutation that brings a tensor of dimensions `from` into the order of `to`; ones stay last.
fn order(from: &[Dim], to: &[&[Dim]]) -> [usize; 4] {
    let places = to.concat().into_iter().map(|dim| from.iter().position(|&x| x == dim).expect("the same dimensions"));
    let places: Vec<_> = places.chain(from.len()..4).collect();
    core::array::from_fn(|i| places[i])
}
