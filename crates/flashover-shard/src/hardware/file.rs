//! A chip from a TOML file. Every rate is text with its unit, because a bandwidth in bits or a memory in GB instead of GiB
//! is an easy mistake that no plan would show.

use serde::Deserialize;

use super::{Hardware, Network};
use crate::error::ShardError;

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    peak_flops: String,
    memory: String,
    memory_bandwidth: String,
    hop_latency: Option<String>,
    network: NetworkTable,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum NetworkTable {
    Torus { axes: usize, axis_bandwidth: String },
    Switch { bandwidth: String, domain: usize, outer_bandwidth: Option<String> },
}

const FLOPS: &[(&str, f64)] = &[("GFLOPS", 1e9), ("TFLOPS", 1e12), ("PFLOPS", 1e15)];
const BYTES: &[(&str, f64)] = &[("MiB", 1048576.0), ("GiB", 1073741824.0), ("MB", 1e6), ("GB", 1e9)];
const RATES: &[(&str, f64)] = &[("MB/s", 1e6), ("GB/s", 1e9), ("TB/s", 1e12)];
const TIMES: &[(&str, f64)] = &[("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3)];

impl Hardware {
    /// Reads a chip. For example:
    ///
    /// ```
    /// # use flashover_shard::hardware::Hardware;
    /// let chip = Hardware::from_toml(r#"
    ///     name = "my-chip"
    ///     peak_flops = "275 TFLOPS"         # dense, bf16
    ///     memory = "32 GiB"
    ///     memory_bandwidth = "1200 GB/s"
    ///     hop_latency = "1 us"              # optional
    ///
    ///     [network]
    ///     kind = "torus"                    # or "switch", with bandwidth, domain and outer_bandwidth
    ///     axes = 3
    ///     axis_bandwidth = "90 GB/s"
    /// "#)?;
    /// assert_eq!(chip.total_bandwidth(), 270e9);
    /// # Ok::<(), flashover_shard::ShardError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the text is not TOML, a field is missing or unknown, or a quantity lacks its unit or has another.
    pub fn from_toml(text: &str) -> Result<Self, ShardError> {
        let parse = |error: toml::de::Error| ShardError::Parse { what: "hardware", message: error.to_string() };
        let file: File = toml::from_str(text).map_err(parse)?;
        let network = match file.network {
            NetworkTable::Torus { axes, axis_bandwidth } => Network::Torus {
                axes: count("network.axes", axes)?,
                axis_bandwidth: rate("network.axis_bandwidth", &axis_bandwidth)?,
            },
            NetworkTable::Switch { bandwidth, domain, outer_bandwidth } => {
                let bandwidth = rate("network.bandwidth", &bandwidth)?;
                let outer = outer_bandwidth.map(|outer| rate("network.outer_bandwidth", &outer));
                let outer_bandwidth = outer.transpose()?.unwrap_or(bandwidth);
                Network::Switch { bandwidth, domain: count("network.domain", domain)?, outer_bandwidth }
            }
        };
        Ok(Hardware {
            name: file.name,
            peak_flops: quantity("peak_flops", &file.peak_flops, FLOPS)?,
            memory_bytes: quantity("memory", &file.memory, BYTES)? as u64,
            memory_bandwidth: rate("memory_bandwidth", &file.memory_bandwidth)?,
            network,
            hop_latency: file.hop_latency.map_or(Ok(0.0), |text| quantity("hop_latency", &text, TIMES))?,
        })
    }
}

fn rate(field: &str, text: &str) -> Result<f64, ShardError> {
    quantity(field, text, RATES)
}

fn count(field: &str, found: usize) -> Result<usize, ShardError> {
    if found > 0 { Ok(found) } else { Err(ShardError::field(format!("hardware: {field}"), "at least 1", found)) }
}

/// A positive number and a unit of the list.
fn quantity(field: &str, text: &str, units: &[(&str, f64)]) -> Result<f64, ShardError> {
    let text = text.trim();
    let end = text.find(|c: char| c.is_ascii_alphabetic() && c != 'e' && c != 'E').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let value = number.trim().parse::<f64>().ok().filter(|value| value.is_finite() && *value > 0.0);
    let factor = units.iter().find(|(name, _)| *name == unit.trim()).map(|(_, factor)| factor);
    value.zip(factor).map(|(value, factor)| value * factor).ok_or_else(|| {
        let names: Vec<_> = units.iter().map(|(name, _)| *name).collect();
        let expected = format!("a positive number and one of {}, as in \"1.5 {}\"", names.join(", "), names[0]);
        ShardError::field(format!("hardware: {field}"), expected, format!("\"{text}\""))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::by_name;

    const TPU_V4: &str = r#"
        name = "tpu-v4"
        peak_flops = "275 TFLOPS"
        memory = "32 GiB"
        memory_bandwidth = "1200 GB/s"
        hop_latency = "1 us"
        [network]
        kind = "torus"
        axes = 3
        axis_bandwidth = "90 GB/s"
    "#;

    #[test]
    fn a_file_can_say_what_a_built_in_chip_is() {
        assert_eq!(Hardware::from_toml(TPU_V4).unwrap(), by_name("tpu-v4").unwrap());
        let h100 = r#"name = "h100"
            peak_flops = "989.4 TFLOPS"
            memory = "80 GiB"
            memory_bandwidth = "3.35 TB/s"
            network = { kind = "switch", bandwidth = "450 GB/s", domain = 8, outer_bandwidth = "50GB/s" }"#;
        assert_eq!(Hardware::from_toml(h100).unwrap(), by_name("h100").unwrap());
    }

    #[test]
    fn a_wrong_unit_is_named() {
        let error = |from: &str, to: &str| Hardware::from_toml(&TPU_V4.replace(from, to)).unwrap_err().to_string();
        assert_eq!(
            error("1200 GB/s", "1200 Gbps"),
            "hardware: memory_bandwidth: expected a positive number and one of MB/s, GB/s, TB/s, as in \"1.5 MB/s\", got \"1200 Gbps\""
        );
        assert!(error("32 GiB", "32").contains("hardware: memory: expected a positive number and one of MiB, GiB"));
        assert!(error("275 TFLOPS", "-275 TFLOPS").starts_with("hardware: peak_flops: expected a positive number"));
        assert!(error("\"90 GB/s\"", "90").starts_with("hardware: "));
        assert!(error("axes = 3", "axes = 0").ends_with("network.axes: expected at least 1, got 0"));
        assert!(error("hop_latency", "hop_latencies").contains("hop_latencies"));
        assert!(error("torus", "mesh").contains("mesh"));
    }

    #[test]
    fn an_unknown_chip_suggests_the_nearest() {
        let error = by_name("tpu-v4i").unwrap_err().to_string();
        assert!(error.contains("did you mean `tpu-v4`?"), "{error}");
    }
}
