//! Owns what an error of the API means to an operator: what is missing, and the exact remedy. Never decides whether
//! to try again.

use std::error::Error;

use kube::core::Status;

/// An error with its causes in one line, each text once.
pub(super) fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    text
}

/// What a request needs to be allowed to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Permission {
    /// As RBAC has it: `nodes/status`.
    pub(super) resource: &'static str,
    /// As RBAC has them: `patch`.
    pub(super) verbs: &'static str,
}

/// What to tell an operator about a request that failed.
pub(super) fn explain(error: &kube::Error, needs: Permission) -> String {
    if let kube::Error::Api(status) = error {
        explain_status(status, needs)
    } else {
        causes(error)
    }
}

/// Likewise, for what the server said in the middle of a watch.
pub(super) fn explain_status(status: &Status, needs: Permission) -> String {
    let Permission { resource, verbs } = needs;
    let said = match (status.message.as_str(), status.reason.as_str()) {
        ("", reason) => reason,
        (message, _) => message,
    };
    match status.code {
        401 => format!(
            "the API server does not know us (401, {said}): check that the service account or user of our \
             token exists and that the token is not expired"
        ),
        403 => format!(
            "{said}: grant it: in the ClusterRole that our service account is bound to, \
             apiGroups: [\"\"], resources: [\"{resource}\"], verbs: [\"{}\"]",
            verbs.replace(' ', "\", \"")
        ),
        429 => format!("the API server asks us to come back later (429, {said})"),
        code => format!("{said} ({code})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_permission_is_named_as_a_rule_that_grants_it() {
        let status = Status {
            code: 403,
            message: "nodes is forbidden: User \"x\" cannot list".to_owned(),
            ..Status::default()
        };
        let needs = Permission {
            resource: "nodes",
            verbs: "list watch",
        };
        let text = explain_status(&status, needs);
        assert!(
            text.ends_with(r#"apiGroups: [""], resources: ["nodes"], verbs: ["list", "watch"]"#),
            "{text}"
        );
    }
}
