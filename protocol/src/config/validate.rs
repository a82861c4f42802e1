//! From raw to validated. (under construction)
