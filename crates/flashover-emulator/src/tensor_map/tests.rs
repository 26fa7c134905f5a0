use super::*;

const F16: Element = Element { bytes: 2, float: true };

/// Device memory with a tensor of `u16` that count up, freed at the end.
struct Tensor {
    address: u64,
    len: usize,
}

impl Tensor {
    fn new(len: usize) -> Tensor {
        let address = memory::allocate(2 * len as u64).unwrap();
        let mut tensor = Tensor { address, len };
        tensor.elements().iter_mut().enumerate().for_each(|(i, x)| *x = i as u16);
        tensor
    }

    fn elements(&mut self) -> &mut [u16] {
        // SAFETY: as many were allocated there, and only this test knows of them.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u16, self.len) }
    }

    /// A map of all of it, as a matrix.
    fn request<'a>(&self, dims: &'a [u64], strides: &'a [u64], boxes: &'a [u32], swizzle: u32) -> Request<'a> {
        let element_strides = &[1; RANK][..dims.len()];
        let address = self.address;
        Request { element: F16, address, dims, strides, boxes, element_strides, interleave: 0, swizzle, nan: false }
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        memory::free(self.address);
    }
}

fn element(shared: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([shared[at], shared[at + 1]])
}

#[test]
fn a_descriptor_survives_memory() {
    let tensor = Tensor::new(64);
    let mut request = tensor.request(&[8, 2, 2, 2, 1], &[16, 32, 64, 128], &[8, 2, 1, 2, 1], 0);
    request.nan = true;
    let map = TensorMap::encode(&request).unwrap();
    assert_eq!(TensorMap::from_bytes(&map.to_bytes()), Ok(map));
    let swizzled = TensorMap::encode(&tensor.request(&[64], &[], &[64], 3)).unwrap();
    assert_eq!(TensorMap::from_bytes(&swizzled.to_bytes()), Ok(swizzled));
    assert_eq!((map.rank(), map.box_bytes()), (5, 64));
    assert!(TensorMap::from_bytes(&[0; SIZE]).is_err());
}

#[test]
fn a_box_inside_is_a_block_of_the_matrix() {
    let tensor = Tensor::new(10 * 24);
    let map = TensorMap::encode(&tensor.request(&[24, 10], &[48], &[8, 3], 0)).unwrap();
    let mut shared = vec![0xee; 512];
    map.read_box(&[9, 4], 128, &mut shared).unwrap();
    for r in 0..3 {
        for c in 0..8 {
            assert_eq!(element(&shared, 128 + 16 * r + 2 * c) as usize, (4 + r) * 24 + 9 + c);
        }
    }
    assert!(shared[..128].iter().chain(&shared[128 + 48..]).all(|&byte| byte == 0xee), "nothing else is touched");
}

#[test]
fn elements_outside_are_filled() {
    let tensor = Tensor::new(4 * 16);
    let mut request = tensor.request(&[13, 4], &[32], &[8, 4], 0);
    for (coords, nan) in [([-3, -1], false), ([9, 2], false), ([9, 2], true), ([100, 0], false), ([0, -100], true)] {
        request.nan = nan;
        let map = TensorMap::encode(&request).unwrap();
        let mut shared = vec![0xee; 64];
        map.read_box(&coords, 0, &mut shared).unwrap();
        for (x, got) in (0..32).map(|x| (x, element(&shared, 2 * x as usize))) {
            let (c, r) = (coords[0] + x % 8, coords[1] + x / 8);
            let inside = (0..13).contains(&c) && (0..4).contains(&r);
            let outside = if nan { 0xffff } else { 0 };
            assert_eq!(got, if inside { (16 * r + c) as u16 } else { outside }, "{coords:?}: ({c}, {r})");
        }
    }
}

/// CUDA C++ Programming Guide, "The swizzle modes": piece `c` of row `r` of 128 bytes lies at `c ^ r % 8`, of 64 bytes
/// at `c ^ r / 2 % 4`, of 32 bytes at `c ^ r / 4 % 2`.
#[test]
fn swizzles_permute_pieces_of_16_bytes() {
    for (code, span) in [(1, 32), (2, 64), (3, 128)] {
        let row = span / 2;
        let tensor = Tensor::new(32 * row);
        let (dims, strides, boxes) = ([row as u64, 32], [span as u64], [row as u32, 16]);
        let map = TensorMap::encode(&tensor.request(&dims, &strides, &boxes, code)).unwrap();
        let mut shared = vec![0; 4096];
        map.read_box(&[0, 16], 1024, &mut shared).unwrap();
        for r in 0..16 {
            let turn = match span {
                32 => r / 4 % 2,
                64 => r / 2 % 4,
                _ => r % 8,
            };
            for c in 0..span / 16 {
                let got = element(&shared, 1024 + r * span + (c ^ turn) * 16) as usize;
                assert_eq!(got, (16 + r) * row + c * 8, "swizzle of {span} bytes: row {r}, piece {c}");
            }
        }
    }
}

/// The bits are those of the address, not of the offset in the box.
#[test]
fn a_swizzle_follows_the_address() {
    let tensor = Tensor::new(64);
    let map = TensorMap::encode(&tensor.request(&[64, 1], &[128], &[64, 1], 3)).unwrap();
    let mut shared = vec![0; 2048];
    map.read_box(&[0, 0], 1024 + 5 * 128, &mut shared).unwrap();
    assert_eq!(element(&shared, 1024 + 5 * 128 + 5 * 16), 0);
    assert_eq!(element(&shared, 1024 + 5 * 128), 5 * 8);
}

#[test]
fn writing_undoes_reading_and_stays_inside() {
    let mut tensor = Tensor::new(2 * 3 * 5 * 64);
    let (dims, strides, boxes) = ([60, 5, 3, 2], [128, 640, 1920], [64, 4, 2, 1]);
    let map = TensorMap::encode(&tensor.request(&dims, &strides, &boxes, 3)).unwrap();
    let mut shared = vec![0xff; 1024];
    let coords = [0, 3, 2, 1];
    map.read_box(&coords, 0, &mut shared).unwrap();
    let before = tensor.elements().to_vec();
    tensor.elements().fill(0xabcd);
    map.write_box(&coords, 0, &shared).unwrap();
    for (i, &got) in tensor.elements().iter().enumerate() {
        let (c, r, s, t) = (i % 64, i / 64 % 5, i / 320 % 3, i / 960);
        let inside = c < 60 && r >= 3 && s == 2 && t == 1;
        assert_eq!(got, if inside { before[i] } else { 0xabcd }, "({c}, {r}, {s}, {t})");
    }
}

#[test]
fn what_the_driver_refuses_is_refused() {
    let tensor = Tensor::new(64);
    let refused = |change: &dyn Fn(&mut Request<'static>), why: &str| {
        let mut request = tensor.request(&[8, 8], &[16], &[8, 4], 0);
        change(&mut request);
        let error = TensorMap::encode(&request).expect_err(why);
        assert!(error.contains(why), "expected {why:?} in {error:?}");
    };
    refused(&|r| r.dims = &[], "a rank from 1 to 5");
    refused(&|r| r.strides = &[], "lengths for rank 2");
    refused(&|r| r.address += 8, "an address");
    refused(&|r| r.dims = &[8, 0], "dimensions from 1");
    refused(&|r| r.strides = &[24], "strides that are multiples of 16");
    refused(&|r| r.strides = &[1 << 40], "below 2^40");
    refused(&|r| r.boxes = &[8, 257], "boxes of 1 to 256");
    refused(&|r| r.boxes = &[8, 0], "boxes of 1 to 256");
    refused(&|r| r.boxes = &[4, 4], "a multiple of 16 bytes");
    refused(&|r| r.element_strides = &[1, 2], "strides of elements");
    refused(&|r| r.interleave = 1, "interleaving");
    refused(&|r| (r.boxes, r.swizzle) = (&[128, 4], 3), "at most 128 bytes");
    refused(&|r| r.swizzle = 3, "rows of 16 bytes in a swizzle of 128");
    refused(&|r| r.swizzle = 4, "swizzle 4");
    refused(&|r| (r.element, r.nan) = (Element { bytes: 2, float: false }, true), "only floats");
}

#[test]
fn copies_that_leave_memory_are_refused() {
    let tensor = Tensor::new(64);
    let map = TensorMap::encode(&tensor.request(&[8, 8], &[16], &[8, 4], 0)).unwrap();
    let mut shared = vec![0; 128];
    assert!(map.read_box(&[0, 0, 0], 0, &mut shared).unwrap_err().contains("2 coordinates"));
    assert!(map.read_box(&[0, 0], 16, &mut shared).unwrap_err().contains("a multiple of 128"));
    assert!(map.read_box(&[0, 0], 128, &mut shared).unwrap_err().contains("leaves the shared memory"));
    assert!(map.write_box(&[0, 0], 128, &shared).unwrap_err().contains("leaves the shared memory"));
    let map = TensorMap::encode(&tensor.request(&[8, 9], &[16], &[8, 4], 0)).unwrap();
    assert_eq!(map.read_box(&[0, 4], 0, &mut shared), Ok(()));
    assert!(map.read_box(&[0, 5], 0, &mut shared).unwrap_err().contains("outside of allocated memory"));
    assert!(map.write_box(&[0, 5], 0, &shared).unwrap_err().contains("outside of allocated memory"));
}
