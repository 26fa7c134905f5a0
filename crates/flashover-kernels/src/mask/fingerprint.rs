//! A number that tells masks apart, the same on every machine and in every version of the compiler, so that a plan
//! that was kept in a file still knows its mask.

/// A running hash of words: multiply and shift, as in MurmurHash3's finalizer. Not a defence against forgery.
#[derive(Debug, Clone)]
pub(crate) struct Fingerprint(u64);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Fingerprint(0x9e37_79b9_7f4a_7c15)
    }

    /// Adds one word.
    pub(crate) fn word(&mut self, word: u32) {
        let mut x = (self.0 ^ u64::from(word)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        x ^= x >> 33;
        self.0 = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        self.0 ^= self.0 >> 29;
    }

    /// Adds words of a fixed number.
    pub(crate) fn words(&mut self, words: &[u32]) {
        words.iter().for_each(|&word| self.word(word));
    }

    /// Adds words of any number: their number first, so that two lists cannot run into each other.
    pub(crate) fn list(&mut self, words: &[u32]) {
        self.word(words.len() as u32);
        self.words(words);
    }

    pub(crate) fn finish(&self) -> u64 {
        self.0
    }
}
