//! `serenity-loader`: fills the ring from the slab.
fn main() {}
