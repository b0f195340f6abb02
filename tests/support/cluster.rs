//! Several RabbitMQ nodes on this machine that make a cluster, by `scripts/rabbitmq`.

use std::path::PathBuf;

use super::rabbit::{Rabbit, run, starting};

/// A cluster; it ends when dropped, and in any case with this process.
pub(crate) struct Cluster {
    /// Its nodes.
    pub(crate) nodes: Vec<Rabbit>,
    directory: PathBuf,
}

impl Cluster {
    /// A cluster of so many nodes, of the version under test.
    pub(crate) fn start(count: usize) -> Self {
        let directory = Rabbit::directory();
        let mut command = starting(&directory);
        command.args(["--nodes", &count.to_string()]);
        run(command);
        let nodes = (1..=count).map(|number| Rabbit::started_in(directory.join(number.to_string()))).collect();
        Self { nodes, directory }
    }

    /// The addresses of all nodes, beginning with this one.
    pub(crate) fn urls(&self, first: usize) -> Vec<String> {
        let mut urls: Vec<_> = self.nodes.iter().map(|node| node.url.clone()).collect();
        urls.rotate_left(first);
        urls
    }

    /// Cuts a node off from the others, while every client still reaches it: they refuse each other's hand-shakes.
    pub(crate) fn cut_off(&self, node: usize) {
        let others = self.nodes.iter().enumerate().filter(|&(index, _)| index != node);
        let names: Vec<_> = others.map(|(_, other)| format!("'{}'", other.name())).collect();
        let cut = format!(
            "[begin erlang:set_cookie(Node, 'another'), erlang:disconnect_node(Node) end || Node <- [{}]].",
            names.join(",")
        );
        self.nodes[node].ctl(&["eval", &cut]);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The first has what the others share.
        self.nodes.reverse();
        self.nodes.clear();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
