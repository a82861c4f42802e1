//! The JSON as written. (under construction)
