//! The font of the pictures, which comes with the program.

use plotters::style::{FontStyle, register_font};

/// Its name in plotters.
pub const NAME: &str = "sans-serif";

/// Makes it known to plotters.
pub fn register() -> Result<(), &'static str> {
    register_font(NAME, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| "the font that comes with this program does not parse")
}
