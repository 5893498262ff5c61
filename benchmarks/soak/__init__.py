"""An hour of mixed traffic against a server: what does it do that it must not? (scripts/soak.sh)"""
