//! Masks that a user writes as a function of one point.
//!
//! The function is scalar code. Written once as a `#[cube] fn` over `u32`, it runs on the host here, and may be called
//! from kernels too. A mask keeps its name only, so that it stays plain data: whoever reads a mask from a file
//! registers the function first.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::error::MaskError;
use super::fingerprint::Fingerprint;
use super::primitive::{Plane, Primitive, Reach};
use super::spans::{Span, Spans};

/// Whether query `i` of head `h` of batch element `b` sees key `j`: `(b, h, i, j)`, all counted from 0.
pub trait PointFunction: Fn(u32, u32, u32, u32) -> bool + Send + Sync + 'static {}

impl<F: Fn(u32, u32, u32, u32) -> bool + Send + Sync + 'static> PointFunction for F {}

/// A registered function by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// The name it is registered by.
    pub name: String,
    /// Whether it looks at `b`. If not, it is called with `b = 0` for all batch elements.
    pub by_batch: bool,
    /// Whether it looks at `h`. If not, it is called with `h = 0` for all heads.
    pub by_head: bool,
}

struct Registered {
    /// Its type, if that says all: nothing is captured.
    identity: Option<TypeId>,
    call: Arc<dyn PointFunction>,
}

static REGISTERED: RwLock<BTreeMap<String, Registered>> = RwLock::new(BTreeMap::new());

/// Registers a function for the life of the process.
///
/// Doing so again is not an error where it must be the same function: a `fn` item, or a closure that captures nothing.
/// Functions are told apart by their types, because the compiler may give one function two addresses.
pub fn register<F: PointFunction>(name: &str, function: F) -> Result<(), MaskError> {
    let identity = (size_of::<F>() == 0).then(TypeId::of::<F>);
    let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
    match registered.entry(name.into()) {
        Entry::Vacant(entry) => {
            entry.insert(Registered { identity, call: Arc::new(function) });
            Ok(())
        }
        Entry::Occupied(entry) if identity.is_some() && entry.get().identity == identity => Ok(()),
        Entry::Occupied(_) => Err(MaskError::FunctionTaken { name: name.into() }),
    }
}

impl Function {
    pub(super) fn bind(&self) -> Result<BoundFunction, MaskError> {
        let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
        let function = registered.get(&self.name).ok_or_else(|| MaskError::UnknownFunction {
            name: self.name.clone(),
            known: registered.keys().cloned().collect(),
        })?;
        Ok(BoundFunction { call: function.call.clone(), by_batch: self.by_batch, by_head: self.by_head })
    }

    pub(super) fn fingerprint(&self, out: &mut Fingerprint) {
        let name: Vec<u32> = self.name.bytes().map(u32::from).collect();
        out.list(&name);
        out.words(&[u32::from(self.by_batch), u32::from(self.by_head)]);
    }
}

/// [`Function`] with its code.
pub(super) struct BoundFunction {
    call: Arc<dyn PointFunction>,
    by_batch: bool,
    by_head: bool,
}

impl Primitive for BoundFunction {
    fn allows(&self, plane: Plane, i: u32, j: u32) -> bool {
        let b = if self.by_batch { plane.b } else { 0 };
        let h = if self.by_head { plane.h } else { 0 };
        (self.call)(b, h, i, j)
    }

    /// Nothing is known about a function without calling it: any query may see any key.
    fn reach(&self, _: Plane, _: Range<u32>, keys: Span) -> Reach {
        Reach { any: Spans::all(keys), all: Spans::none() }
    }

    fn signature(&self, _: Plane, _: Range<u32>, _: Span, _: &mut Vec<u32>) -> bool {
        false
    }

    fn bits(&self, plane: Plane, queries: Range<u32>, keys: Span, out: &mut [u32]) {
        let words = (keys.end - keys.start).div_ceil(32) as usize;
        for (row, i) in out.chunks_exact_mut(words).zip(queries) {
            for (n, j) in (keys.start..keys.end).enumerate() {
                row[n / 32] |= u32::from(self.allows(plane, i, j)) << (n % 32);
            }
        }
    }
}
