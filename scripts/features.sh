# The one set of flags and features of tests, clippy and docs, so that Burn is compiled once. Sourced, not run.
FEATURES="flashover/webgpu,flashover/fusion,flashover/ndarray,flashover-shard/ndarray"
FLAGS=(--release --workspace --features "$FEATURES")
