#!/bin/sh
# A child that misbehaves as its request says, for tests of what the agent does about it.
read -r request
case "$request" in
*'"answer"'*)
    echo '{"progress":{"phase":"receiving","done":1,"total":2,"bytes":3}}'
    echo '"step"'
    echo '{"done":42}'
    ;;
*'"fail"'*) echo '{"failed":{"class":"auth","message":"no\u001b[31m entry"}}' ;;
*'"ask"'*)
    echo '{"ask":{"number":20}}'
    read -r reply
    case "$reply" in
    '{"Ok":21}') echo '{"done":"thanks"}' ;;
    *) echo '{"failed":{"class":"conflict","message":"refused"}}' ;;
    esac
    ;;
*'"crash"'*)
    head -c 100000 /dev/zero | tr '\0' 'x' >&2
    echo 'the last words' >&2
    exit 7
    ;;
*'"die"'*) kill -SEGV $$ ;;
*'"silent"'*) exit 0 ;;
*'"garbage"'*) echo 'hello' ;;
*'"half"'*) printf '{"done":' ;;
*'"flood"'*) tr '\0' 'x' </dev/zero ;;
*'"linger"'*)
    echo '{"done":1}'
    sleep 600
    ;;
*'"stubborn"'*)
    trap '' TERM
    # One that a signal to the child alone would not reach.
    sleep 600 &
    echo "{\"progress\":{\"phase\":\"$$ $!\"}}"
    while :; do sleep 1; done
    ;;
*'"busy"'*)
    for _ in 1 2 3 4 5 6 7 8; do
        echo '"step"'
        sleep 0.2
    done
    echo '{"done":1}'
    ;;
*'"around"'*)
    printf '{"done":"%s %s %s"}\n' "$(pwd)" "${CARGO_MANIFEST_DIR:-none}" "$HOME"
    ;;
esac
