//! The registers of a warp: each is 32 lanes of 32 or 64 bits, side by side.

use crate::ptx::Slot;

/// Lanes of a warp.
pub(crate) const LANES: usize = 32;
/// One number a lane.
pub(crate) type Lanes<T> = [T; LANES];

/// The registers of a warp.
pub(crate) struct Registers {
    file: Vec<u64>,
    /// A bit a lane.
    pub predicates: Vec<u32>,
}

impl Registers {
    /// `slots` places of 32 lanes of 32 bits; they hold what nobody wrote.
    pub(crate) fn new(slots: u32, predicates: u32) -> Self {
        let file = vec![0x7ff7_a5a5_7fa5_a5a5; slots as usize * LANES / 2 + LANES];
        Registers { file, predicates: vec![0; predicates as usize + 1] }
    }

    #[inline(always)]
    pub(crate) fn get(&self, slot: Slot) -> &Lanes<u32> {
        let at = slot as usize * LANES;
        debug_assert!(at + LANES <= self.file.len() * 2);
        // SAFETY: places come from the parser, which counted them for `new`.
        unsafe { &*self.file.as_ptr().cast::<u32>().add(at).cast() }
    }

    #[inline(always)]
    pub(crate) fn get64(&self, slot: Slot) -> &Lanes<u64> {
        let at = slot as usize * LANES / 2;
        debug_assert!(at + LANES <= self.file.len());
        // SAFETY: as above; places of 64 bits are even.
        unsafe { &*self.file.as_ptr().add(at).cast() }
    }

    #[inline(always)]
    pub(crate) fn at(&mut self, slot: Slot) -> &mut Lanes<u32> {
        let at = slot as usize * LANES;
        // SAFETY: as above.
        unsafe { &mut *self.file.as_mut_ptr().cast::<u32>().add(at).cast() }
    }

    #[inline(always)]
    pub(crate) fn at64(&mut self, slot: Slot) -> &mut Lanes<u64> {
        let at = slot as usize * LANES / 2;
        // SAFETY: as above.
        unsafe { &mut *self.file.as_mut_ptr().add(at).cast() }
    }

    /// Writes the lanes of `mask`.
    #[inline(always)]
    pub(crate) fn put(&mut self, slot: Slot, mask: u32, x: &Lanes<u32>) {
        let to = self.at(slot);
        if mask == u32::MAX {
            *to = *x;
        } else {
            for l in 0..LANES {
                to[l] = if mask >> l & 1 != 0 { x[l] } else { to[l] };
            }
        }
    }

    /// Writes the lanes of `mask`.
    #[inline(always)]
    pub(crate) fn put64(&mut self, slot: Slot, mask: u32, x: &Lanes<u64>) {
        let to = self.at64(slot);
        if mask == u32::MAX {
            *to = *x;
        } else {
            for l in 0..LANES {
                to[l] = if mask >> l & 1 != 0 { x[l] } else { to[l] };
            }
        }
    }

    /// Writes the lanes of `mask` of a predicate.
    #[inline(always)]
    pub(crate) fn put_predicate(&mut self, at: u32, mask: u32, x: u32) {
        let to = &mut self.predicates[at as usize];
        *to = *to & !mask | x & mask;
    }

    /// The lanes where a predicate, or its negation, holds.
    #[inline(always)]
    pub(crate) fn holds(&self, at: u32, negated: bool) -> u32 {
        let x = self.predicates[at as usize];
        if negated { !x } else { x }
    }
}

/// The lanes of a mask.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..LANES).filter(move |l| mask >> l & 1 != 0)
}
