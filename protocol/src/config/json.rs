//! From text to the raw structs, with errors that name the place: duplicate keys refused, `--set` applied, unknown keys answered with
//! the nearest known one.
//!
//! The list of known keys is serde's: it is taken from the message of `deny_unknown_fields`, and for the hint "this key belongs to
//! section x" from the field names that the derived code itself asks for ([`known_keys`]).

use std::fmt;
use std::path::Path;

use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::{Map, Value};

use super::raw::{
    RawAdapter, RawCheckpoint, RawConceptTable, RawConfig, RawData, RawDistributed, RawLogging, RawMemory, RawModel, RawOptimizer,
    RawSample, RawScheduler, RawStagehand, RawValidation,
};
use crate::error::{Error, Result};

/// Parses JSON; a key given twice in one object is an error, not the last one's victory.
pub(super) fn parse(text: &str, source: &Path) -> Result<Value> {
    let mut json = serde_json::Deserializer::from_str(text);
    let value: Strict = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let place = e.path().to_string();
        let made = Error::config(format!(
            "the configuration is not valid JSON{}",
            if place == "." { String::new() } else { format!(", at `{place}`") }
        ));
        made.at(source).cause(e.into_inner()).advice("correct the file; every key may be given once")
    })?;
    json.end().map_err(|e| Error::config("the configuration has text after its last brace").at(source).cause(e))?;
    match value.0 {
        Value::Object(_) => Ok(value.0),
        _ => Err(Error::config("the configuration must be a JSON object").at(source)),
    }
}

/// A JSON value without duplicate keys.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Strict;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }
            fn visit_bool<E>(self, v: bool) -> Result<Strict, E> {
                Ok(Strict(v.into()))
            }
            fn visit_i64<E>(self, v: i64) -> Result<Strict, E> {
                Ok(Strict(v.into()))
            }
            fn visit_u64<E>(self, v: u64) -> Result<Strict, E> {
                Ok(Strict(v.into()))
            }
            fn visit_f64<E>(self, v: f64) -> Result<Strict, E> {
                Ok(Strict(v.into()))
            }
            fn visit_str<E>(self, v: &str) -> Result<Strict, E> {
                Ok(Strict(v.into()))
            }
            fn visit_unit<E>(self) -> Result<Strict, E> {
                Ok(Strict(Value::Null))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Strict, A::Error> {
                let mut all = Vec::new();
                while let Some(Strict(next)) = seq.next_element()? {
                    all.push(next);
                }
                Ok(Strict(Value::Array(all)))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strict, A::Error> {
                let mut all = Map::new();
                while let Some(key) = map.next_key::<String>()? {
                    if all.contains_key(&key) {
                        return Err(serde::de::Error::custom(format!("the key `{key}` is given twice")));
                    }
                    let Strict(value) = map.next_value()?;
                    all.insert(key, value);
                }
                Ok(Strict(Value::Object(all)))
            }
        }
        deserializer.deserialize_any(V)
    }
}

/// Applies one `--set key=value`: dotted keys, numbers index lists; the value is JSON, or else a string.
pub(super) fn set(root: &mut Value, assignment: &str) -> Result<()> {
    let bad = |what: &str| Error::config(format!("`--set {assignment}`: {what}")).advice("write --set section.key=value");
    let (key, text) = assignment.split_once('=').ok_or_else(|| bad("there is no `=`"))?;
    let value = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_string()));
    let mut place = root;
    for part in key.split('.') {
        if part.is_empty() {
            return Err(bad("a part of the key is empty"));
        }
        if place.is_null() {
            *place = Value::Object(Map::new());
        }
        place = match place {
            Value::Object(map) => map.entry(part).or_insert(Value::Null),
            Value::Array(all) => {
                let length = all.len();
                part.parse::<usize>()
                    .ok()
                    .and_then(|i| all.get_mut(i))
                    .ok_or_else(|| bad(&format!("`{part}` is no index of a list of {length}")))?
            }
            _ => return Err(bad(&format!("`{part}` lies under a plain value"))),
        };
    }
    *place = value;
    Ok(())
}

/// Puts `value` at `keys`, making objects on the way.
pub(super) fn put(root: &mut Value, keys: &[&str], value: Value) {
    let mut place = root;
    for key in keys {
        if !place.is_object() {
            *place = Value::Object(Map::new());
        }
        let Value::Object(map) = place else { return };
        place = map.entry(*key).or_insert(Value::Null);
    }
    *place = value;
}

/// The raw structs from JSON; every error names the key by its path.
pub(super) fn to_raw(mut value: Value, source: &Path) -> Result<RawConfig> {
    drop_nulls(&mut value);
    serde_path_to_error::deserialize(&value).map_err(|e| {
        let path = e.path().to_string();
        explain(&path, &e.into_inner().to_string()).at(source)
    })
}

/// `null` means "not given", for sections too.
fn drop_nulls(value: &mut Value) {
    if let Value::Object(map) = value {
        map.retain(|_, v| !v.is_null());
        map.values_mut().for_each(drop_nulls);
    }
}

/// Makes serde's message an answer to "what is wrong, what was expected, what do I do".
fn explain(path: &str, message: &str) -> Error {
    let Some(rest) = message.strip_prefix("unknown field `") else {
        return Error::config(format!("the value of `{path}` is not usable")).cause(message);
    };
    let (key, expected) = rest.split_once('`').unwrap_or((rest, ""));
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    // The path ends with the unknown key itself.
    let section = path.strip_suffix(key).unwrap_or(path).trim_end_matches('.');
    let place = if section.is_empty() { "at the root".to_string() } else { format!("in `{section}`") };
    let error = Error::config(format!("unknown key `{key}` {place}"));
    match (nearest(key, &known), section_with(key, section)) {
        (Some(near), _) => error.advice(format!("did you mean `{near}`?")),
        (None, Some(other)) => error.advice(format!("`{key}` belongs {other}")),
        // The whole list only where nothing better can be said: the root alone has some sixty keys.
        (None, None) => error.expected(format!("one of {}", known.join(", "))).advice("remove it, or correct its spelling"),
    }
}

/// The known key that is most like `key`, if any is like it at all.
fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let lower = key.to_lowercase();
    known
        .iter()
        .map(|k| (strsim::jaro_winkler(&lower, k).max(1.0 - strsim::damerau_levenshtein(&lower, k) as f64 / k.len().max(1) as f64), *k))
        .filter(|(score, _)| *score >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

/// Where a key that is unknown in `section` is known.
fn section_with(key: &str, section: &str) -> Option<String> {
    let found = known_keys().into_iter().find(|(name, keys)| *name != section && keys.contains(&key));
    found.map(|(name, _)| if name.is_empty() { "at the root".to_string() } else { format!("in `{name}`") })
}

/// Every section with its keys, as the derived code names them.
pub(super) fn known_keys() -> Vec<(&'static str, &'static [&'static str])> {
    vec![
        ("", fields_of::<RawConfig>()),
        ("model", fields_of::<RawModel>()),
        ("adapter", fields_of::<RawAdapter>()),
        ("memory", fields_of::<RawMemory>()),
        ("memory.stagehand", fields_of::<RawStagehand>()),
        ("data", fields_of::<RawData>()),
        ("data.concepts[]", fields_of::<RawConceptTable>()),
        ("optimizer", fields_of::<RawOptimizer>()),
        ("scheduler", fields_of::<RawScheduler>()),
        ("checkpoint", fields_of::<RawCheckpoint>()),
        ("validation", fields_of::<RawValidation>()),
        ("sample", fields_of::<RawSample>()),
        ("logging", fields_of::<RawLogging>()),
        ("distributed", fields_of::<RawDistributed>()),
    ]
}

/// The field names that a derived `Deserialize` asks its deserializer for.
fn fields_of<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Ask<'a>(&'a mut &'static [&'static str]);
    impl<'de> Deserializer<'de> for Ask<'_> {
        type Error = serde::de::value::Error;
        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("only structs have fields"))
        }
        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            Err(serde::de::Error::custom("the names are all that is wanted"))
        }
        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }
    let mut fields: &'static [&'static str] = &[];
    // The error is the expected way out; the names have been noted by then.
    let _ = T::deserialize(Ask(&mut fields));
    fields
}
