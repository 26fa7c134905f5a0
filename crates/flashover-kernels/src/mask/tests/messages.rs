//! What bad masks are told.

use super::super::*;

const EXTENT: Extent = Extent { batch: 2, heads: 4, seq_q: 10, seq_kv: 12 };

fn refused(mask: Mask, message: &str) {
    let found = mask.bind(EXTENT).map(|_| ()).unwrap_err().to_string();
    assert_eq!(found, message, "{mask:?}");
}

#[test]
fn numbers() {
    refused(Mask::sliding_window(0), "sliding_window: expected at least 1 key (the query's own), got 0");
    refused(Mask::window(u32::MAX, 0), "window left: expected at most 1073741824 keys, got 4294967295");
    refused(Mask::sliding_window(u32::MAX), "window left: expected at most 1073741824 keys, got 4294967294");
    refused(Mask::prefix_lm(u32::MAX), "visible sinks: expected at most 1073741824 keys, got 4294967295");
    refused(Mask::dilated(1, 1, 0), "dilation: expected at least 1, got 0");
    refused(Mask::strided(0), "dilation: expected at least 1, got 0");
    refused(Mask::strided(2_000_000_000), "dilation: expected at most 1073741824, got 2000000000");
    refused(Mask::butterfly(0), "butterfly block: expected at least 1, got 0");
    let shape = BigBird { block: 4, global: 1, window: 1, random: 1, seed: 0 };
    refused(Mask::bigbird(BigBird { block: 0, ..shape }), "bigbird block: expected at least 1, got 0");
    let many = BigBird { random: u32::MAX, ..shape };
    refused(Mask::bigbird(many), "bigbird random blocks: expected at most 1073741824, got 4294967295");
    refused(
        Mask::longformer(1, vec![u32::MAX]),
        "longformer global token: expected at most 1073741824, got 4294967295",
    );
    let long = Extent { seq_kv: u32::MAX, ..EXTENT };
    let error = Mask::causal().bind(long).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "keys: expected at most 536870911, got 4294967295");
}

#[test]
fn lengths_heads_and_batch() {
    refused(Mask::documents(vec![0; 9], vec![0; 12]), "segment ids of the queries: expected 10, got 9");
    refused(Mask::documents(vec![0; 10], vec![0; 13]), "segment ids of the keys: expected 12, got 13");
    let three = Documents { queries: vec![vec![0; 10]; 3], keys: vec![vec![0; 12]] };
    refused(Mask::Documents(three), "documents: expected batch of 2 or 1, got 3");
    refused(Mask::per_head(vec![Mask::causal(); 3]), "per_head: expected 4 masks, got 3");
    refused(Mask::per_batch(vec![]), "per_batch: expected 2 masks, got 0");
    let dense = |shape: [u32; 4]| Mask::from_dense(shape, &vec![true; shape.iter().product::<u32>() as usize]).unwrap();
    refused(dense([1, 1, 10, 11]), "from_dense: expected [Sq, Skv] = [10, 12], got [10, 11]");
    refused(dense([3, 1, 10, 12]), "from_dense: expected batch of 2 or 1, got 3");
    refused(dense([1, 2, 10, 12]), "from_dense: expected heads of 4 or 1, got 2");
    let error = Mask::from_dense([1, 1, 2, 3], &[true; 5]).unwrap_err();
    assert_eq!(error.to_string(), "from_dense [1, 1, 2, 3]: expected 6 booleans, got 5");
    let short = r#"{"dense":{"shape":[1,1,10,12],"words":[1,2,3]}}"#;
    refused(serde_json::from_str(short).unwrap(), "from_dense [1, 1, 10, 12]: expected 10 words, got 3");
    // The message of an operand comes through.
    refused(Mask::causal() & !dense([1, 1, 10, 11]), "from_dense: expected [Sq, Skv] = [10, 12], got [10, 11]");
}

#[test]
fn listed_blocks() {
    let table = |starts: &[u32], columns: &[u32]| {
        let (starts, columns) = (starts.to_vec(), columns.to_vec());
        Mask::from_blocks(BlockTable { block: [5, 4], batch: 1, heads: 1, starts, columns })
    };
    table(&[0, 1, 3], &[2, 0, 1]).bind(EXTENT).unwrap();
    refused(table(&[0, 1], &[2]), "from_blocks: expected 3 row starts (rows + 1), got 2");
    refused(table(&[1, 1, 1], &[2]), "from_blocks: start of row 0: expected 0, got 1");
    refused(table(&[0, 2, 1], &[2]), "from_blocks: start of row 2: expected at least 2, got 1");
    refused(table(&[0, 1, 2], &[2]), "from_blocks: start of row 2: expected 1, the end of the indices, got 2");
    refused(table(&[0, 1, 2], &[2, 3]), "from_blocks: row 1: expected block indices below 3, got 3");
    refused(table(&[0, 2, 2], &[1, 1]), "from_blocks: row 0: expected every block once, got 1 twice");
    refused(table(&[0, 0, 2], &[2, 1]), "from_blocks: row 1: expected ascending block indices, got 1 after 2");
    let sized = |block| BlockTable { block, batch: 1, heads: 1, starts: vec![], columns: vec![] };
    refused(Mask::from_blocks(sized([0, 1])), "rows of a block: expected at least 1, got 0");
    refused(Mask::from_blocks(sized([1, 0])), "columns of a block: expected at least 1, got 0");
    let heads = BlockTable { heads: 3, ..sized([1, 1]) };
    refused(Mask::from_blocks(heads), "from_blocks: expected heads of 4 or 1, got 3");
}

#[test]
fn functions() {
    fn one(_: u32, _: u32, i: u32, _: u32) -> bool {
        i == 1
    }
    let two = |_: u32, _: u32, i: u32, _: u32| i == 2;
    Mask::function("messages: a name", one).unwrap();
    Mask::function("messages: a name", one).unwrap();
    let taken = "mask function \"messages: a name\": expected a name that is not taken, got one registered for another \
                 function";
    assert_eq!(Mask::function("messages: a name", two).unwrap_err().to_string(), taken);
    // What a closure captured cannot be compared, nor what a pointer points to.
    let capturing = |key: u32| move |_: u32, _: u32, _: u32, j: u32| j == key;
    register("messages: captured", capturing(3)).unwrap();
    register("messages: captured", capturing(3)).unwrap_err();
    let pointer: fn(u32, u32, u32, u32) -> bool = one;
    assert_eq!(register("messages: a name", pointer).unwrap_err().to_string(), taken);
    let unknown = Mask::Function(Function { name: "nobody's".into(), by_batch: true, by_head: true });
    let error = unknown.bind(EXTENT).map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("mask function: expected one of the registered ["), "{error}");
    assert!(error.contains("\"messages: a name\"") && error.ends_with("], got \"nobody's\""), "{error}");
}
