"""The painted world, its reader, and the tiny base model that effect measurements run on."""
