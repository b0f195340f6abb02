//! Which publishes in flight there may be news of.
//!
//! Only those are looked at: with hundreds in flight, looking at all of them for each confirm would be most of a lane's
//! work. A ready-made set of futures would do, but for two things: it may stop in the middle to let others run, and a
//! lane has to see everything that came before what it saw.

use std::{
    sync::{Arc, Mutex, PoisonError},
    task::{Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// The number of a publish in flight, ascending.
pub(super) type Number = u64;

/// What a lane's bells have rung for.
#[derive(Default)]
pub(super) struct News {
    numbers: Mutex<Vec<Number>>,
    lane: AtomicWaker,
}

impl News {
    /// A bell for one publish.
    pub(super) fn bell(self: &Arc<Self>, number: Number) -> Waker {
        Waker::from(Arc::new(Bell { number, news: Arc::clone(self) }))
    }

    /// Says whom to wake; before what has rung is taken.
    pub(super) fn wake(&self, lane: &Waker) {
        self.lane.register(lane);
    }

    /// Takes what has rung since, in its order; a number may be there more than once.
    pub(super) fn take(&self) -> Vec<Number> {
        std::mem::take(&mut self.numbers.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Bell {
    number: Number,
    news: Arc<News>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.news.numbers.lock().unwrap_or_else(PoisonError::into_inner).push(self.number);
        self.news.lane.wake();
    }
}
