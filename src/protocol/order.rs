//! The order of tasks within one project.

use serde::{Deserialize, Serialize};

/// A task's place in the order of its project.
///
/// Generations decide where both sides have one; else the order of first arrival at the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The master's own order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Microseconds since the epoch at first admission; unique on a node.
    pub arrived: i64,
}

impl Place {
    /// Whether something newer than `self`, namely `other`, makes `self` stale.
    #[must_use]
    pub fn is_older_than(self, other: Self) -> bool {
        match (self.generation, other.generation) {
            (Some(ours), Some(theirs)) if ours != theirs => ours < theirs,
            _ => self.arrived < other.arrived,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_decide_before_arrival_does() {
        let place = |generation, arrived| Place { generation, arrived };
        let cases = [
            (place(Some(1), 9), place(Some(2), 1), true),
            (place(Some(2), 1), place(Some(1), 9), false),
            (place(Some(1), 1), place(Some(1), 2), true),
            (place(None, 1), place(Some(5), 2), true),
            (place(Some(9), 1), place(None, 2), true),
            (place(None, 2), place(None, 1), false),
            (place(None, 1), place(None, 1), false),
        ];
        for (task, other, older) in cases {
            assert_eq!(task.is_older_than(other), older, "{task:?} {other:?}");
        }
    }
}
