"""The narrow waist: dsmoe::route, dsmoe::experts, dsmoe::moe."""
