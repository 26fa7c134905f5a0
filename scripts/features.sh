# The sets of flags and features of tests, clippy and docs, so that Burn is compiled once. Sourced, not run.
FEATURES="flashover/webgpu,flashover/fusion,flashover/ndarray"
# What does without Burn is built apart: its dependencies' features would otherwise compile Burn anew.
WITHOUT_BURN=(flashover-shard flashover-cli)
FLAGS=(--release --workspace "${WITHOUT_BURN[@]/#/--exclude=}" --features "$FEATURES")
LIGHT_FLAGS=(--release "${WITHOUT_BURN[@]/#/--package=}")
