//! Whether a node's own user can do more, or less, than its work needs.

use super::{Exam, finding};
use crate::{
    broker::management::{Inventory, PermissionView, Told},
    doctor::{Finding, Severity, User, UserRole},
};

impl Exam<'_> {
    /// Only administrators are told; and a fleet whose nodes share one user has none of their own.
    pub(super) fn users(&self, inventory: &Inventory, findings: &mut Vec<Finding>) {
        let Told::Yes(permissions) = &inventory.permissions else { return };
        for node in &self.facts.nodes {
            let user = |enrols_itself| {
                let role = UserRole::Node { node: node.clone(), enrols_itself };
                User::new(&self.wanted.names, &self.wanted.results, &role)
            };
            let (strict, loose) = (user(false), user(true));
            let Some(found) = permissions.iter().find(|found| found.user == strict.name()) else { continue };
            let mend = strict.permission_commands(&self.facts.vhost).join(" && ");
            if *found != strict.permission && *found != loose.permission {
                let PermissionView { configure, write, read, .. } = found;
                let problem = format!(
                    "it may do other things than its work needs: configure {configure:?}, write {write:?}, read {read:?}"
                );
                findings.push(finding(Severity::Yellow, &format!("user {}", found.user), problem, mend));
            } else if let Told::Yes(topics) = &inventory.topic_permissions
                && !topics.iter().any(|topic| Some(topic) == strict.topic.as_ref())
            {
                let problem = "it may publish events in the name of other nodes";
                findings.push(finding(Severity::Yellow, &format!("user {}", found.user), problem, mend));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::Names,
        doctor::{Facts, Wanted},
        protocol::NodeName,
    };

    #[test]
    fn a_node_s_user_that_may_do_other_things_is_yellow() {
        let node = NodeName::new("a").unwrap();
        let names = Names::default();
        let wanted = Wanted {
            results: names.master_event(),
            names: names.clone(),
            nodes: vec![node.clone()],
            longest_deadline: std::time::Duration::from_mins(25),
        };
        let facts = Facts {
            addresses: Vec::new(),
            version: None,
            nodes: vec![node.clone()],
            missing: Vec::new(),
            depths: std::collections::BTreeMap::new(),
            inventory: Told::default(),
            management_base: None,
            vhost: "/".to_owned(),
            consumer_timeout: std::time::Duration::ZERO,
        };
        let problems = |permission: PermissionView, topic| {
            let inventory = Inventory {
                permissions: Told::Yes(vec![permission]),
                topic_permissions: Told::Yes(Vec::from_iter(topic)),
                ..Inventory::default()
            };
            let mut findings = Vec::new();
            Exam { wanted: &wanted, facts: &facts }.users(&inventory, &mut findings);
            findings.iter().map(|finding| finding.problem.clone()).collect::<Vec<_>>()
        };
        for enrols_itself in [false, true] {
            let user = User::new(&names, "", &UserRole::Node { node: node.clone(), enrols_itself });
            assert_eq!(problems(user.permission.clone(), user.topic.clone()), [""; 0]);
            assert!(problems(user.permission.clone(), None)[0].contains("in the name of other nodes"));
            let wide = PermissionView { read: ".*".to_owned(), ..user.permission };
            assert!(problems(wide, user.topic)[0].contains(r#"read ".*""#));
        }
        let other = PermissionView { user: "haul".to_owned(), ..PermissionView::default() };
        assert_eq!(problems(other, None), [""; 0]);
    }
}
