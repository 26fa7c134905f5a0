//! What crosses the border to C: handles, pointers to results, arrays and texts.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::status::{Answer, Status};

/// A handle: for C a pointer to something opaque, here a number.
pub(crate) type Handle = usize;

/// Things that C knows by handles.
pub(super) struct Handles<T> {
    things: Mutex<(Handle, BTreeMap<Handle, Arc<T>>)>,
}

impl<T> Handles<T> {
    /// The handles of one kind of thing follow `kind`, so that handles of two kinds are never taken for one another.
    pub const fn new(kind: u32) -> Handles<T> {
        Handles { things: Mutex::new(((kind as usize) << 32, BTreeMap::new())) }
    }

    fn lock(&self) -> MutexGuard<'_, (Handle, BTreeMap<Handle, Arc<T>>)> {
        self.things.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new handle.
    pub fn add(&self, thing: T) -> Handle {
        let (last, things) = &mut *self.lock();
        *last += 16;
        things.insert(*last, Arc::new(thing));
        *last
    }

    pub fn get(&self, handle: Handle) -> Result<Arc<T>, Status> {
        self.lock().1.get(&handle).cloned().ok_or(Status::InvalidHandle)
    }

    pub fn remove(&self, handle: Handle) -> Result<Arc<T>, Status> {
        self.lock().1.remove(&handle).ok_or(Status::InvalidHandle)
    }
}

/// Where C wants a result.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub fn put(self, value: T) -> Answer {
        if self.0.is_null() {
            return Err(Status::InvalidValue);
        }
        // SAFETY: the API asks that a pointer to a result is valid where it is not null.
        unsafe { self.0.write(value) };
        Ok(())
    }

    /// As [`Out::put`], where a result may be left out.
    pub fn offer(self, value: T) -> Answer {
        if self.0.is_null() { Ok(()) } else { self.put(value) }
    }

    /// Whether it is aligned to so many bytes.
    pub fn aligned_to(self, bytes: usize) -> bool {
        (self.0 as usize).is_multiple_of(bytes)
    }

    /// A place that C did not give, for tests.
    #[cfg(test)]
    pub fn to(value: &mut T) -> Out<T> {
        Out(value)
    }
}

impl Out<c_char> {
    /// Writes a text and its end into `len` bytes, cut off where it is longer.
    pub fn put_text(self, text: &str, len: i32) -> Answer {
        if self.0.is_null() || len < 1 {
            return Err(Status::InvalidValue);
        }
        let len = text.len().min(len as usize - 1);
        // SAFETY: the API asks for `len` bytes at the pointer, of which these and the end are no more.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), self.0.cast(), len);
            self.0.add(len).write(0);
        }
        Ok(())
    }
}

/// An array that C hands over.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Array<T>(*const T);

impl<T: Copy> Array<T> {
    /// Its first `len` elements.
    pub fn read(self, len: usize) -> Result<Vec<T>, Status> {
        if len == 0 {
            return Ok(Vec::new());
        }
        if self.0.is_null() {
            return Err(Status::InvalidValue);
        }
        // SAFETY: the API asks for that many elements at a pointer that is not null.
        Ok((0..len).map(|i| unsafe { self.0.add(i).read_unaligned() }).collect())
    }

    /// An array of Rust's, for tests.
    #[cfg(test)]
    pub fn of(elements: &[T]) -> Array<T> {
        Array(elements.as_ptr())
    }
}

/// A text that C hands over, with its end.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Text(*const c_char);

impl Text {
    pub fn read(self) -> Result<String, Status> {
        if self.0.is_null() {
            return Err(Status::InvalidValue);
        }
        // SAFETY: the API asks for a text with its end at a pointer that is not null.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str().map(str::to_owned).map_err(|_| Status::InvalidImage)
    }

    /// A text of Rust's, for tests.
    #[cfg(test)]
    pub fn of(text: &'static CStr) -> Text {
        Text(text.as_ptr())
    }
}
