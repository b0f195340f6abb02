//! What the writer does when the journal cannot be used, or is damaged.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio::sync::watch;

use super::{JournalError, Request, Rows, State, Step, Write};
use crate::journal::Page;

/// Reads what is kept in memory again; what is damaged is renewed first.
pub(super) async fn read_again(rows: &mut impl Rows, state: &mut State) -> Result<(), JournalError> {
    let mut trouble = state.damage.take();
    // What looked whole may turn out damaged when it is read.
    for _ in 0..2 {
        if let Some(JournalError::Damaged { reason, .. }) = &trouble
            && let Err(error) = rows.renew(reason).await
        {
            state.damage = trouble;
            return Err(error);
        }
        match State::load(rows).await {
            Ok(read) => {
                *state = read;
                return Ok(());
            }
            Err(error) => trouble = Some(error),
        }
    }
    let error = trouble.unwrap_or(JournalError::Closed);
    state.damage = Some(error.clone());
    Err(error)
}

/// Answers a request with why nothing can be done for it.
pub(super) fn refuse(request: Request, error: &JournalError) {
    let error = error.clone();
    // Whoever asked may be gone; then nobody waits for the answer.
    match request {
        Request::Step { decide, .. } => {
            // It decides on a blank page, so that it can be told; nothing of that is kept.
            let blank = Step { page: &mut Page::default(), clones: &|_| Vec::new(), next_arrival: 0 };
            if let Ok(answer) = catch_unwind(AssertUnwindSafe(|| decide(blank))) {
                answer(Err(error));
            }
        }
        Request::SetNote { reply, .. } | Request::Probe { reply } | Request::Close { reply } => {
            drop(reply.send(Err(error)));
        }
        Request::Note { reply, .. } => drop(reply.send(Err(error))),
        Request::Owing { reply } | Request::Running { reply } => drop(reply.send(Err(error))),
        Request::Prune { reply, .. } => drop(reply.send(Err(error))),
    }
}

/// Writes a batch; on a full disk the reserve is given up for it, so that what was begun can be settled.
pub(super) async fn write_or_relieve(
    rows: &mut impl Rows,
    batch: &[Write],
    strain: &watch::Sender<bool>,
) -> Result<(), JournalError> {
    if batch.is_empty() {
        return Ok(());
    }
    match rows.write(batch).await {
        damaged @ Err(JournalError::Damaged { .. }) => damaged,
        Err(error) if rows.relieve().await => {
            tracing::error!(error = %error, "the journal's reserve is given up");
            strain.send_replace(true);
            rows.write(batch).await
        }
        written => written,
    }
}
